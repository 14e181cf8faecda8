"""The spectral step on matrices large enough to be iterated, in float32."""

import pytest
import torch

from drift_merge.maths.spectra.bands import parse_bands
from drift_merge.maths.spectra.steps import SpectralStep, rank_of_share
from tests import reference_spectral as reference
from tests.maths.spectra.matrices import with_values

KEY = 77
VALUES = [8.0, 4.0, 2.0, 1.0, *[0.5 * 0.9**i for i in range(40)]]


def exact(matrix, factors):
    return reference.directions(reference.svd(matrix), factors)


def near(found, expected):
    return (found.double() - expected).norm() <= 1e-4 * 8.0  # the first value, residual over gaps


@pytest.mark.parametrize("shape", [(400, 300), (300, 500)])
@pytest.mark.parametrize("norm", ["frobenius", "nuclear", "none"])
def test_a_rank_gives_the_leading_directions_at_the_norm(shape, norm):
    matrix = with_values(shape, VALUES, seed=1)
    found = SpectralStep(rank=2, norm=norm).apply(matrix.clone(), KEY)
    assert near(found, reference.leading(matrix, 2, norm))


def test_bands_closed_and_open():
    matrix = with_values((400, 300), VALUES, seed=2)
    bands = parse_bands("0:1=0.5,2:4=-1")
    assert near(
        SpectralStep(bands=bands).apply(matrix.clone(), KEY), exact(matrix, [0.5, 0, -1, -1])
    )
    bands = parse_bands("0:2=0.1,2:=0.75")
    opened = exact(matrix, [0.1, 0.1, *[0.75] * 298])
    assert near(SpectralStep(bands=bands).apply(matrix.clone(), KEY), opened)


def test_gates():
    matrix = with_values((400, 300), VALUES, seed=3)
    gates = torch.tensor([0.25, 1.0, 0.5])
    found = SpectralStep(gates=gates).apply(matrix.clone(), KEY)
    assert near(found, exact(matrix, gates.tolist()))


@pytest.mark.parametrize(("percent", "rank"), [(1, 1), (40, 1), (50, 1), (51, 2), (100, 3)])
def test_the_rank_of_a_share_is_the_fewest(percent, rank):
    assert rank_of_share(torch.tensor([2.0, 1.0, 1.0]), percent) == rank


def test_no_direction_of_zeros_is_kept_but_one():
    assert rank_of_share(torch.zeros(4), 40.0) == 1
    assert not SpectralStep(eta=40.0, norm="nuclear").apply(torch.zeros(5, 4), KEY).any()


@pytest.mark.parametrize(
    "text", ["", "0:2", "0:2=x", "2:2=1", "-1:2=1", "0:2=inf", "0:2=1,1:3=1", "0:=1,5:6=1", "4=1"]
)
def test_bands_that_make_no_sense_are_refused(text):
    with pytest.raises(ValueError, match=r"band|factor"):
        parse_bands(text)
