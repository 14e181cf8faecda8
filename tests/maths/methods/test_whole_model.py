"""TIES trimmed over the whole model: thresholds from counts that are added over tensors."""

import pytest
import torch

from drift_merge.maths.chunks import in_memory
from drift_merge.maths.methods import METHODS, global_trimming
from tests import reference_methods as reference
from tests.maths.methods.driver import settings_for

SHAPES = [(40, 30), (7,), (0, 5), (100, 9)]


def model(seed, count=3, kind="normal"):
    """Tensors of a model, each as [base, mllm, reasoner, ...]."""
    generator = torch.Generator().manual_seed(seed)
    tensors = []
    for index, shape in enumerate(SHAPES):
        base = torch.randn(shape, generator=generator)
        spread = 0.1 * (index + 1)
        taus = [spread * torch.randn(shape, generator=generator) for _ in range(count)]
        if kind == "tied":
            base, taus = base.bfloat16().float(), [(t * 8).round() / 8 for t in taus]
        tensors.append([base, *(base + tau for tau in taus)])
    return tensors


def thresholds(tensors, settings, chunk):
    reads = [in_memory(mllm, others, base, chunk) for base, mllm, *others in tensors]
    numel = sum(tensor[0].numel() for tensor in tensors)
    counts = sum(global_trimming.upper_counts(read, settings) for read in reads)
    wanted = global_trimming.wanted(numel, settings)
    places = [global_trimming.locate(row, wanted) for row in counts]
    lower = sum(global_trimming.lower_counts(read, settings, places) for read in reads)
    return [global_trimming.threshold(*pair) for pair in zip(places, lower, strict=True)]


@pytest.mark.parametrize("density", [0.001, 0.2, 0.5, 1.0])
@pytest.mark.parametrize("kind", ["normal", "tied"])
def test_the_threshold_is_the_order_statistic_of_all_tensors(density, kind):
    tensors = model(1, kind=kind)
    settings = settings_for("ties", (1,), reasoners=2, density=density)
    found = thresholds(tensors, settings, 50)
    for index, value in enumerate(found, start=1):
        every = torch.cat([(t[0] - t[index]).abs().flatten() for t in tensors])
        count = max(1, round(density * len(every)))
        assert value == float(every.sort(descending=True).values[count - 1])


def test_counts_do_not_depend_on_chunks():
    tensors = model(1)
    settings = settings_for("ties", (1,), reasoners=2)
    assert thresholds(tensors, settings, 13) == thresholds(tensors, settings, 10**6)


def test_a_merge_with_given_thresholds_is_the_papers_over_the_flattened_model():
    tensors = model(2)
    settings = settings_for("ties", (1,), reasoners=2, density=0.2)
    found = thresholds(tensors, settings, 77)
    merged = []
    for base, mllm, *others in tensors:
        state = global_trimming.given(found)
        for chunk in in_memory(mllm, others, base, 64)():
            merged.append(METHODS["ties"].combine(chunk, state, settings).clone())
    flat = [torch.cat([t[i].flatten() for t in tensors]).double().tolist() for i in range(4)]
    exact = reference.ties(flat[1:], flat[0], 0.2, 1.0)
    assert torch.allclose(torch.cat(merged).double(), torch.tensor(exact).double(), atol=2e-6)


def test_entries_equal_to_a_given_threshold_are_all_kept():
    tau = torch.tensor([0.5, -0.5, 0.25, 0.5, 1.0])
    zero = torch.zeros(5)
    settings = settings_for("ties", (5,), density=0.2)
    [chunk] = in_memory(zero, [tau], zero, 5)()
    found = METHODS["ties"].combine(chunk, global_trimming.given([0.5, 0.5]), settings)
    assert found.tolist() == [0.5, -0.5, 0.0, 0.5, 1.0]
