"""Deltas on the way to a device: the ring and its order, here with a CPU as the device."""

import pytest
import torch

import drift_merge
from drift_merge.training import gradient_bias
from drift_merge.training.deltas import placement
from drift_merge.training.deltas.placement import Resident, StreamedDeltas
from drift_merge.training.units import Origin, Region, Unit
from tests.training.toys import loss_of, read_region, selected

CPU = torch.device("cpu")


class Counting:
    """A source that says what was read of it, and when."""

    def __init__(self):
        self.read = []

    def chunk(self, unit, begin, block, out):
        self.read.append(unit.name)
        out.copy_(torch.arange(begin, begin + block.numel) + 100 * int(unit.name))

    def rows(self, unit, first, end):
        raise AssertionError


def two_steps(model, handle):
    for step in range(2):
        model.zero_grad()
        loss_of(model, step).backward()
        handle.apply()


def units(count, numel=12):
    found = {}
    for number in range(count):
        parameter = torch.nn.Parameter(torch.empty(numel))
        unit = Unit(str(number), "p", parameter, "mlp", 0, (numel,), 0, Origin(0, 0, False))
        found[unit] = Region(flat=(0, numel))
    return found


@pytest.mark.parametrize("order", ["forward", "backward", "twice", "random"])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_streamed_deltas_are_right_in_any_order(count, order):
    regions, source = units(count), Counting()
    streamed = StreamedDeltas(source, regions, CPU, torch.float32)
    listed = list(regions)
    orders = {
        "forward": listed * 3,
        "backward": listed[::-1] * 3,
        "twice": [u for u in listed for _ in range(2)] * 2,
        "random": [listed[i % count] for i in (3, 1, 4, 1, 5, 9, 2, 6)],
    }
    for unit in orders[order]:
        wanted = torch.arange(12.0) + 100 * int(unit.name)
        assert torch.equal(read_region(streamed, unit, regions[unit]), wanted)


def test_each_unit_is_read_once_a_step_and_the_next_one_ahead():
    regions, source = units(4), Counting()
    streamed = StreamedDeltas(source, regions, CPU, torch.float32)
    for _ in range(3):
        for unit in regions:
            read_region(streamed, unit, regions[unit])  # measured
            read_region(streamed, unit, regions[unit])  # biased
    streamed._reader.shutdown()
    assert source.read == ["0", "1", "2", "3"] * 3 + ["0"]  # the first of the next step is there


@pytest.mark.parametrize("kind", ["held", "streamed"])
def test_gradients_are_the_same_wherever_delta_waits(toy, monkeypatch, kind):
    def place(source, regions, device, *, dtype, **_):
        if kind == "streamed":
            return StreamedDeltas(source, regions, device, dtype)
        return placement._resident(source, regions, device, dtype)

    found = []
    for placed in (False, True):
        if placed:
            monkeypatch.setattr(gradient_bias, "place", place)
        model = toy.model()
        handle = drift_merge.attach(model, toy.prior)
        two_steps(model, handle)
        found.append(torch.cat([p.grad.flatten() for p in selected(model).values()]))
    assert torch.equal(*found)


def test_of_a_streamed_prior_each_delta_is_carried_once_a_step(toy, monkeypatch):
    carried = []

    class Watched(StreamedDeltas):
        def _carry(self, unit, slot):
            carried.append(unit.name)
            super()._carry(unit, slot)

    monkeypatch.setattr(gradient_bias, "StreamedDeltas", Watched)
    monkeypatch.setattr(gradient_bias, "place", lambda *a, dtype, **_: Watched(*a[:3], dtype))
    model = toy.model()
    handle = drift_merge.attach(model, toy.prior)
    two_steps(model, handle)
    handle._bias.injectors[0].pieces[0].source._reader.shutdown()
    assert len(carried) == 2 * 20 + 1  # and the first of the next step


def test_rows_are_those_of_what_is_held():
    regions = units(2)
    unit = next(iter(regions))
    held = Resident({unit: torch.arange(12.0)})
    assert held.rows(unit, 3, 5).tolist() == [[3.0], [4.0]]


@pytest.mark.gpu
@pytest.mark.parametrize("device", ["auto", "cpu", "cuda"])
@pytest.mark.parametrize("rule", ["absolute", "adaptive_cosine"])
def test_a_gpu_gives_what_a_cpu_gives(toy, device, rule):
    found = []
    for where in ("cpu", "cuda"):
        model = toy.model().to(where)
        handle = drift_merge.attach(model, toy.prior, rule=rule, alpha=1.0, device=device)
        for name, parameter in selected(model).items():
            generator = torch.Generator().manual_seed(len(name))
            parameter.grad = torch.randn(parameter.shape, generator=generator).to(where)
        handle.apply()
        found.append(torch.cat([p.grad.flatten().cpu() for p in selected(model).values()]))
        assert handle.report()["cosine"] is not None
    assert torch.allclose(*found, rtol=1e-4, atol=1e-6)


@pytest.mark.gpu
def test_a_model_that_moves_to_the_gpu_after_attach_is_followed(toy):
    model = toy.model()
    handle = drift_merge.attach(model, toy.prior)
    model.to("cuda")
    for parameter in selected(model).values():
        parameter.grad = torch.ones_like(parameter)
    handle.apply()
    assert handle.metrics()["drift/bias_ratio"] > 0
