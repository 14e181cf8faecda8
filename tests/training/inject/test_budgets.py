"""What a step of a 7B costs on a GPU, counted: launches, and bytes of the device's memory.

Everything lies on the meta device; a dispatch mode counts what torch launches, and kernels that
compute nothing count what they would.
"""

from math import prod

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from drift_merge.maths.injection import RULES
from drift_merge.training.deltas.held import Resident
from drift_merge.training.deltas.packed import plain_packing
from drift_merge.training.gradients.layout import PlainLayout
from drift_merge.training.inject import injector as module
from drift_merge.training.inject.injector import Injector, TensorSlots
from drift_merge.training.inject.pieces import DensePiece
from drift_merge.training.units import Origin, Unit

META = torch.device("meta")
HIDDEN, KV, INTERMEDIATE, LAYERS = 3584, 512, 18944, 28  # Qwen2.5-7B
SHAPES = {
    "q_proj.weight": (HIDDEN, HIDDEN),
    "q_proj.bias": (HIDDEN,),
    "k_proj.weight": (KV, HIDDEN),
    "k_proj.bias": (KV,),
    "v_proj.weight": (KV, HIDDEN),
    "v_proj.bias": (KV,),
    "o_proj.weight": (HIDDEN, HIDDEN),
    "gate_proj.weight": (INTERMEDIATE, HIDDEN),
    "up_proj.weight": (INTERMEDIATE, HIDDEN),
    "down_proj.weight": (HIDDEN, INTERMEDIATE),
}


class Counts(TorchDispatchMode):
    """Launches and bytes of what torch does; views launch nothing."""

    def __init__(self):
        super().__init__()
        self.launches, self.bytes = 0, 0

    def add(self, tensors):
        self.launches += 1
        self.bytes += sum(t.numel() * t.element_size() for t in tensors)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        returns = func._schema.returns
        is_view = returns and all(r.alias_info and not r.alias_info.is_write for r in returns)
        if not is_view and "empty" not in func.name():
            tensors = [a for a in (*args, result) if isinstance(a, torch.Tensor)]
            self.add(tensors)
        return result


class CountedKernels:
    """As Triton's: two launches for the sums and one for the bias, for each pair of dtypes."""

    name = "counted"

    def __init__(self, counts):
        self._counts = counts

    def sums(self, runs, into):
        kinds = {(run.gradient.dtype, run.delta.elements.dtype) for run in runs}
        for kind in kinds:
            same = [r for r in runs if (r.gradient.dtype, r.delta.elements.dtype) == kind]
            self._counts.add([torch.empty(len(same), dtype=torch.int64, device=META)])
            self._counts.add([t for r in same for t in (r.gradient, r.delta.elements)])
            blocks = sum(-(-r.numel // 4096) for r in same)
            self._counts.add([torch.empty(blocks * 2, dtype=torch.float64, device=META)])

    def bias(self, runs, coefficients):
        kinds = {(run.gradient.dtype, run.delta.elements.dtype) for run in runs}
        for kind in kinds:
            same = [r for r in runs if (r.gradient.dtype, r.delta.elements.dtype) == kind]
            self._counts.add([t for r in same for t in (r.gradient, r.gradient, r.delta.elements)])


def injector_of(kernels, rule, monkeypatch, gradient=torch.bfloat16):
    """An injector for all tensors of a 7B, gradients and deltas in place."""

    class Found:
        batch_elements = 2**62 if kernels is not None else 2**26

        def __init__(self, *_):
            pass

        def get(self):
            return kernels

    monkeypatch.setattr(module, "LazyKernels", Found)
    layout, pieces, held = PlainLayout(), [], {}
    for layer in range(LAYERS):
        for name, shape in SHAPES.items():
            parameter = torch.nn.Parameter(torch.empty(shape, dtype=gradient, device=META))
            parameter.grad = torch.empty(shape, dtype=gradient, device=META)
            whole = f"layers.{layer}.{name}"
            unit = Unit(whole, whole, parameter, "mlp", layer, shape, 0, Origin(0, 0, False))
            packing = plain_packing(prod(shape), torch.bfloat16)
            buffer = torch.empty(packing.size_bytes, dtype=torch.uint8, device=META)
            held[unit] = (packing, buffer)
            pieces.append(DensePiece(unit, len(pieces), layout.region(unit), layout))
    source = Resident(held)
    for piece in pieces:
        piece.source = source
    count = len(pieces)
    ones = torch.ones(count, dtype=torch.float64)
    names = tuple(piece.unit.name for piece in pieces)
    slots = TensorSlots(names, ("mlp",) * count, (1.0,) * count, *[ones] * 5)
    injector = Injector(pieces, slots, RULES[rule])
    injector.to(META)
    return injector, sum(piece.numel for piece in pieces)


@pytest.mark.parametrize("scale", [None, 1024.0])
@pytest.mark.parametrize("rule", sorted(RULES))
def test_a_step_of_a_7b_takes_few_launches_and_little_more_than_two_passes(
    rule, scale, monkeypatch
):
    counts = Counts()
    injector, elements = injector_of(CountedKernels(counts), rule, monkeypatch)
    injector.apply(1.0, scale)  # builds what is built once
    with counts:
        counts.launches = counts.bytes = 0
        injector.apply(1.0, scale)
    assert elements > 6.5e9
    assert counts.launches <= 40
    assert 10 * elements <= counts.bytes <= 12 * elements


@pytest.mark.slow
def test_the_loop_would_take_thousands(monkeypatch):
    """The count counts: what the kernels spare is there without them."""
    counts = Counts()
    injector, elements = injector_of(None, "adaptive_cosine", monkeypatch)
    injector.apply(1.0)
    with counts:
        injector.apply(1.0)
    assert counts.launches > 2000
    assert counts.bytes > 30 * elements
