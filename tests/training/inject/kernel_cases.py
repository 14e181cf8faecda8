"""Runs that kernels are tried on, and what they must do with them."""

import pytest
import torch

import drift_merge
from drift_merge.training.deltas.files import Direct
from drift_merge.training.inject.kernels import choose
from drift_merge.training.inject.kernels.runs import DELTAS, GRADIENTS, Run
from tests.training.toys import loss_of, selected

WIDTH = 50
SIZES = ((0, 20_011), (0, 100), (2, 8192), (3, 0))  # slot and elements of four runs
COEFFICIENTS = torch.tensor([0.3, 9.9, -0.7, 1.0], dtype=torch.float64)


def runs_of(gradient, delta, scaling):
    """Four runs of three slots, and delta in float32 as `Direct` means it."""
    generator = torch.Generator().manual_seed(0)
    runs, wide = [], []
    for slot, numel in SIZES:
        g = torch.randn(numel, generator=generator).to(gradient)
        d = torch.randn(numel, generator=generator) * (60 if delta == torch.int8 else 0.01)
        d = d.clamp(-127, 127).to(delta)
        at, scales = 7 + torch.arange(numel), None
        values = d.float()
        if scaling != "none":
            count = WIDTH if scaling == "column" else numel // WIDTH + 2
            scales = torch.rand(count, generator=generator) * 1e-3
            values = values * scales[at % WIDTH if scaling == "column" else at // WIDTH]
        runs.append(Run(slot, g, Direct(d, scales, 7, WIDTH, scaling == "column"), g))
        wide.append(values)
    return runs, wide


def check(kernels, gradient, delta, scaling, *, is_exact):
    runs, wide = runs_of(gradient, delta, scaling)
    exact = torch.zeros(4, 3, dtype=torch.float64)
    expected, bound = [], torch.zeros(4, 3, dtype=torch.float64)
    for run, values in zip(runs, wide, strict=True):
        g, d = run.gradient.double(), values.double()
        exact[run.slot, :2] += torch.stack([g @ g, g @ d])
        # A block is added up in float32: 2**-24 of every term, log2(4096) + 1 times at most.
        bound[run.slot, :2] += 13 * 2**-24 * torch.stack([g @ g, g.abs() @ d.abs()])
        c = COEFFICIENTS[run.slot].float()
        expected.append(run.gradient.float().addcmul(values, c, value=-1).to(gradient))
    found, again = (torch.zeros(4, 3, dtype=torch.float64) for _ in range(2))
    kernels.sums(runs, found)
    kernels.sums(runs, again)
    assert torch.equal(found, again)
    # 4096 / 32 lanes of the CPU's are added one after the other.
    assert bool(((found - exact).abs() <= 11 * bound).all())
    kernels.bias(runs, COEFFICIENTS)
    for run, wanted in zip(runs, expected, strict=True):
        if is_exact:
            assert torch.equal(run.gradient, wanted)
        else:  # Triton's interpreter rounds bfloat16 otherwise, by two steps at most
            error = (run.gradient.float() - wanted.float()).abs()
            assert bool((error <= 2 * 2**-7 * wanted.float().abs() + 1e-6).all())


CASES = [(g, d, "none") for g in GRADIENTS for d in DELTAS] + [
    (g, d, scaling) for g in GRADIENTS for d in DELTAS[3:] for scaling in ("row", "column")
]


def trained(toy, rule, monkeypatch, kernels):
    """Gradients after three steps, one of them at alpha 0, and the report."""
    monkeypatch.setattr(choose, "_kernels", lambda *_: kernels)
    model = toy.model()
    schedule = [1.0, 0.0, 0.5].__getitem__
    handle = drift_merge.attach(model, toy.prior, rule=rule, alpha=0.7, schedule=schedule)
    found = []
    for step in range(3):
        model.zero_grad()
        loss_of(model, step).backward()
        handle.apply()
        found += [p.grad.clone() for p in selected(model).values()]
    report = handle.report()
    handle.remove()
    return found, report


def check_handle(toy, rule, monkeypatch, kernels):
    """A handle trains the same with kernels as by the loop."""
    loop, loop_report = trained(toy, rule, monkeypatch, None)
    found, report = trained(toy, rule, monkeypatch, kernels)
    for ours, theirs in zip(found, loop, strict=True):
        # The coefficient's last bit in float32 may differ with the sums.
        assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-8)
        assert rule != "absolute" or torch.equal(ours, theirs)
    for key in ("cosine", "bias_ratio", "distance"):
        assert report[key] == pytest.approx(loop_report[key], rel=1e-5)
