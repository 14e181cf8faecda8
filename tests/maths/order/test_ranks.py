"""Values by rank within rows: the fast way equals sorting each row, ties by position."""

import numpy as np
import pytest
import torch

from drift_merge.maths.order import ranks
from drift_merge.maths.order.ranks import by_rank


def naive(magnitudes: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    found = torch.empty_like(magnitudes)
    for row, out in zip(magnitudes.numpy(), found.numpy(), strict=True):
        out[np.argsort(-row, kind="stable")] = values.numpy()  # the first of equal ones first
    return found


@pytest.mark.parametrize(
    ("rows", "width"),
    [(1, 1), (3, 7), (1, 40_000), (23, 1536), (65, 1536), (300, 128), (257, 160), (2, 70_000)],
)
@pytest.mark.parametrize("levels", [3, None])
def test_every_shape_equals_sorting_each_row(rows, width, levels):
    generator = torch.Generator().manual_seed(rows * width)
    magnitudes = torch.randn(rows, width, generator=generator).abs()
    if levels is not None:  # nearly all are equal
        magnitudes = (magnitudes * levels).round() / levels
    magnitudes[0, 0] = 0.0
    values = torch.linspace(0.9, 0.1, width)
    before = magnitudes.clone()
    assert torch.equal(by_rank(magnitudes, values), naive(magnitudes, values))
    assert torch.equal(magnitudes, before)


def test_float64_is_ranked_too():
    magnitudes = torch.rand(40, 1536, dtype=torch.float64)
    values = torch.rand(1536, dtype=torch.float64)
    assert torch.equal(by_rank(magnitudes, values), naive(magnitudes, values))


def test_large_blocks_are_sorted_by_their_bits(monkeypatch):
    monkeypatch.setattr(ranks, "_by_comparison", None)
    assert by_rank(torch.rand(42, 1536), torch.rand(1536)).shape == (42, 1536)
