"""Factors of a delta beside a whole SVD in float64; without transformers."""

import pytest
import torch

from drift_merge.trainers.extraction.factors import factorize

EPS = torch.finfo(torch.float32).eps


def take(delta, *, rank=None, energy=None, max_rank=None, dtype=torch.float32):
    return factorize(delta, "layer", rank=rank, energy=energy, max_rank=max_rank, dtype=dtype)


def falling(m, n, ratio, seed=0):
    """A matrix whose singular values fall by a ratio."""
    generator = torch.Generator().manual_seed(seed)
    u, v = (
        torch.linalg.qr(torch.randn(size, min(m, n), generator=generator, dtype=torch.float64))[0]
        for size in (m, n)
    )
    return ((u * ratio ** torch.arange(min(m, n), dtype=torch.float64)) @ v.T).float()


@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e20])
@pytest.mark.parametrize("shape", [(1, 7), (7, 1), (40, 24), (400, 300)])
def test_product_is_the_truncated_svd_at_any_scale(shape, scale):
    delta = falling(*shape, 0.8) * scale
    pair = take(delta, rank=3)
    u, values, vt = torch.linalg.svd(delta.double(), full_matrices=False)
    rank = min(3, *shape)
    expected = (u[:, :rank] * values[:rank]) @ vt[:rank]
    assert pair.rank == rank
    difference = (pair.b.double() @ pair.a.double() - expected).norm() / delta.double().norm()
    assert float(difference) <= 1e-4  # vectors are found to 1e-5 of the first value, over the gap
    kept = float(values[:rank].square().sum() / values.square().sum())
    assert pair.kept == pytest.approx(kept, rel=1e-5)
    assert pair.error**2 == pytest.approx(1 - kept, abs=1e-4)


@pytest.mark.parametrize("shape", [(60, 40), (700, 500)])
@pytest.mark.parametrize("energy", [0.1, 0.5, 0.9, 0.999])
def test_energy_takes_as_few_directions_as_hold_it(shape, energy):
    delta = falling(*shape, 0.97)
    pair = take(delta, energy=energy)
    values = torch.linalg.svdvals(delta.double()).square()
    held = values.cumsum(0) / values.sum()
    assert pair.rank == 1 + int((held < energy).sum())
    assert take(delta, energy=energy, max_rank=4).rank == min(4, pair.rank)


def test_directions_of_mere_rounding_are_left_out():
    left, right = torch.randn(50, 2), torch.randn(2, 30)
    assert take(left @ right, rank=16).rank == 2
    assert take(left @ right, energy=1.0).rank == 2


def test_zeros_have_no_factors():
    assert take(torch.zeros(5, 3), rank=2) is None


def test_bfloat16_factors_state_their_own_rounding():
    delta = falling(40, 24, 0.5)
    pair = take(delta, rank=24, dtype=torch.bfloat16)
    error = (delta - pair.b.float() @ pair.a.float()).norm() / delta.norm()
    assert pair.error == pytest.approx(float(error), rel=1e-4)
    assert 1e-4 < pair.error < 1e-2
