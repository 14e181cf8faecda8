"""ZeRO-2 with CPU offload: gradients are read after their copies to the host have arrived.

DeepSpeed copies without blocking and waits at the start of its own step. Here the copies arrive
when somebody waits, as they may on a GPU. The real DeepSpeed: tests/real_engines.
"""

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

import drift_merge
from drift_merge.training.gradients.deepspeed import deepspeed_layout
from drift_merge.training.gradients.layout import PlainLayout
from drift_merge.training.units import Origin, Unit
from tests.training.toys import loss_of


class DeepSpeedZeroOptimizer:
    """What the layout needs of ZeRO-2's optimizer on one rank."""

    cpu_offload = True
    loss_scale = 1
    optimizer = None

    def __init__(self, parameter):
        self.round_robin_bit16_groups = [[parameter]]
        self.real_dp_process_group = [None]
        self.partition_size = [parameter.numel()]
        master = torch.zeros(parameter.numel())
        master.grad = torch.full((parameter.numel(),), 7.0)  # of the last step
        self.single_partition_of_fp32_groups = [master]
        self.norm_for_param_grads = {}
        self.late = []

    def copy(self, gradient):
        self.late.append(gradient)

    def arrive(self):
        for gradient in self.late:
            self.single_partition_of_fp32_groups[0].grad.copy_(gradient.flatten())
        self.late.clear()

    def get_param_id(self, parameter):
        return 0


class WithWait(DeepSpeedZeroOptimizer):
    def _wait_for_offload_copies(self):
        self.arrive()


WithWait.__name__ = "DeepSpeedZeroOptimizer"


@pytest.mark.parametrize("kind", [DeepSpeedZeroOptimizer, WithWait], ids=["synchronize", "wait"])
def test_the_gradients_of_this_step_are_read(monkeypatch, kind):
    monkeypatch.setattr(torch.distributed, "get_rank", lambda group: 0)
    parameter = torch.nn.Parameter(torch.zeros(2, 3))
    optimizer = kind(parameter)
    module = ModuleType("deepspeed.accelerator")
    module.get_accelerator = lambda: SimpleNamespace(synchronize=optimizer.arrive)
    monkeypatch.setitem(sys.modules, "deepspeed.accelerator", module)
    layout = deepspeed_layout(torch.nn.Module(), optimizer)
    name = "layers.0.mlp.up_proj.weight"
    unit = Unit(name, name, parameter, "mlp", 0, (2, 3), 0, Origin(0, 0, False))
    optimizer.copy(torch.ones(2, 3))
    assert layout.gradient(unit)[0] == 7.0
    layout.wait()
    assert torch.equal(layout.gradient(unit), torch.ones(6))
    layout.wait()  # nothing is under way
    layout.gradient(unit).mul_(2)
    assert torch.equal(optimizer.single_partition_of_fp32_groups[0].grad, torch.full((6,), 2.0))


def test_a_step_waits_before_it_reads_its_first_gradient(toy, monkeypatch):
    order = []
    for name in ("wait", "gradient"):
        own = getattr(PlainLayout, name)

        def spy(self, *args, own=own, name=name):
            order.append(name)
            return own(self, *args)

        monkeypatch.setattr(PlainLayout, name, spy)
    model = toy.model()
    handle = drift_merge.attach(model, toy.prior)
    for _ in range(2):
        model.zero_grad()
        loss_of(model).backward()
        order.clear()
        handle.apply()
        assert order[0] == "wait"
        assert set(order[1:]) == {"gradient"}
