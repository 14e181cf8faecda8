"""Norms, and the factor that makes the kept directions weigh what the whole matrix does."""

import pytest
import torch

from drift_merge.maths.spectra.leading import full, leading
from drift_merge.maths.spectra.norms import (
    first_share,
    frobenius,
    matching_factor,
    nuclear,
    stable_rank,
)
from tests.maths.spectra.matrices import with_values

EPS = torch.finfo(torch.float32).eps


def test_norms_are_those_of_float64():
    matrix = torch.randn(300, 200, generator=torch.Generator().manual_seed(0))
    wide = matrix.double()
    assert frobenius(matrix) == pytest.approx(float(wide.norm()), rel=4 * EPS)
    assert nuclear(matrix) == pytest.approx(float(torch.linalg.svdvals(wide).sum()), rel=16 * EPS)


@pytest.mark.parametrize("power", [-110, 100])
def test_the_frobenius_norm_of_extreme_numbers_neither_underflows_nor_overflows(power):
    matrix = torch.randn(90, 8, generator=torch.Generator().manual_seed(0))
    assert frobenius(matrix * 2.0**power) == frobenius(matrix) * 2.0**power


def test_kept_directions_times_the_factor_have_the_norm_of_the_matrix():
    matrix = with_values((300, 200), [4.0, 2.0, 1.0, 0.5], seed=1)
    found = leading(matrix, 2, key=5)
    whole = {"frobenius": (16 + 4 + 1 + 0.25) ** 0.5, "nuclear": 7.5}
    for norm, size in {"frobenius": frobenius, "nuclear": nuclear}.items():
        matched = found.product() * matching_factor(matrix, found.values, norm)
        assert size(matched) == pytest.approx(whole[norm], rel=1e-5)
    assert matching_factor(matrix, found.values, "none") == 1.0


def test_all_directions_need_no_factor_and_zeros_get_none():
    matrix = with_values((300, 200), [4.0, 2.0], seed=2)
    values = leading(matrix, 2, key=5).values
    for norm in ("frobenius", "nuclear"):
        assert matching_factor(matrix, values, norm) == pytest.approx(1.0, rel=1e-5)
        assert matching_factor(torch.zeros(4, 3), torch.zeros(1), norm) == 1.0


def test_share_and_stable_rank():
    matrix = with_values((50, 40), [3.0, 2.0, 2.0, 1.0], seed=3)
    found, norm = full(matrix), frobenius(matrix)
    assert first_share(found, norm) == pytest.approx(9 / 18)
    assert stable_rank(found, norm) == pytest.approx(2.0)
    zero = full(torch.zeros(4, 3))
    assert first_share(zero, 0.0) == 0.0
    assert stable_rank(zero, 0.0) == 0.0
