"""Random masks: uniform, independent, and functions of key and position alone."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from drift_merge.maths.masks import hashes, keep_mask, mixed_key, uniform
from tests.strategies import few

NUMEL = 2**20
KEYS = [mixed_key(*pair) for pair in ((0, 0), (0, 1), (1, 0), (7, 0), (2**64 - 1, 0))]


@given(st.integers(0, 2**64 - 1), st.integers(0, 2**33), st.integers(1, 300), st.data())
@few
def test_a_mask_does_not_depend_on_where_it_is_cut(key, begin, numel, data):
    whole = hashes(key, begin, numel)
    cut = data.draw(st.integers(0, numel))
    parts = [hashes(key, begin, cut), hashes(key, begin + cut, numel - cut)]
    assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize("begin", [0, 1, 2**16 - 1, 2**16, 3 * 2**16 + 7, 2**40])
def test_a_mask_over_many_blocks_is_that_of_its_parts(begin):
    key, numel, step = KEYS[3], 5 * 2**16 + 11, 2**14 + 3
    parts = [hashes(key, begin + i, min(step, numel - i)) for i in range(0, numel, step)]
    assert torch.equal(hashes(key, begin, numel), torch.cat(parts))


def test_blocks_are_independent_of_each_other():
    # The share of entries kept in both of two blocks, for every pair of the first 48 blocks.
    block, density = 2**16, 0.1
    masks = torch.stack(
        [keep_mask(KEYS[0], i * block, density, torch.empty(block)) for i in range(48)]
    )
    together = masks @ masks.T / block
    pairs = together[~torch.eye(48, dtype=torch.bool)]
    deviation = (density**2 * (1 - density**2) / block) ** 0.5
    assert float((pairs - density**2).abs().max()) < 6 * deviation
    assert float((pairs - density**2).std()) < 1.5 * deviation


def test_the_generator_has_not_changed():
    # Recorded once: another result means other masks for every seed.
    assert hashes(0x0123456789ABCDEF, 2**16 - 2, 4).tolist() == [
        1894676262,
        -415200642,
        -39320221,
        -472187141,
    ]


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("density", [0.1, 0.5, 0.9])
def test_the_share_of_kept_entries_is_the_density(key, density):
    kept = float(keep_mask(key, 0, density, torch.empty(NUMEL)).mean())
    assert abs(kept - density) < 5 * (density * (1 - density) / NUMEL) ** 0.5


@pytest.mark.parametrize("key", KEYS)
def test_every_byte_of_the_upper_half_is_uniform(key):
    words = hashes(key, 0, NUMEL).long() & 0xFFFFFFFF
    for shift in (16, 24):
        counts = torch.bincount(words >> shift & 0xFF, minlength=256).double()
        chi_squared = float(((counts - NUMEL / 256) ** 2 / (NUMEL / 256)).sum())
        assert 255 - 5 * 22.6 < chi_squared < 255 + 5 * 22.6  # 255 degrees, deviation sqrt(510)


@pytest.mark.parametrize("lag", [1, 2, 3, 64, 128, 1536, 2048, 4096])
@pytest.mark.parametrize("key", KEYS)
def test_neighbors_in_rows_and_columns_are_independent(key, lag):
    values = uniform(key, 0, torch.empty(NUMEL)) - 0.5
    product = float((values[lag:] * values[:-lag]).mean()) * 12
    assert abs(product) < 5 / (NUMEL - lag) ** 0.5


def test_masks_of_different_keys_are_independent():
    values = [uniform(key, 0, torch.empty(NUMEL)) - 0.5 for key in KEYS]
    for index, one in enumerate(values):
        for other in values[:index]:
            for lag in (0, 1, 1000):
                product = float((one[lag:] * other[: NUMEL - lag]).mean()) * 12
                assert abs(product) < 5 / (NUMEL - lag) ** 0.5


def test_keys_of_streams_and_neighboring_seeds_differ_in_half_their_bits():
    keys = [mixed_key(seed, stream) for seed in range(20) for stream in range(5)]
    assert len(set(keys)) == len(keys)
    distances = [(one ^ other).bit_count() for one, other in pairwise(keys)]
    assert 28 < sum(distances) / len(distances) < 36


@pytest.mark.parametrize(("density", "kept"), [(0.0, 0.0), (1.0, 1.0), (2.0, 1.0)])
def test_the_ends_keep_nothing_and_everything(density, kept):
    assert keep_mask(3, 0, density, torch.empty(1000)).unique().tolist() == [kept]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_masks_and_chances_have_the_dtype_of_the_chunk(dtype):
    like = torch.empty(1000, dtype=dtype)
    assert keep_mask(3, 0, 0.5, like).dtype == uniform(3, 0, like).dtype == dtype
    assert torch.equal(keep_mask(3, 0, 0.5, like), keep_mask(3, 0, 0.5, like.float()).to(dtype))
    chances = uniform(3, 0, like)
    assert 0.0 <= float(chances.min()) <= float(chances.max()) < 1.0


def test_the_mean_over_seeds_of_dare_approaches_the_task_vector():
    tau = torch.linspace(-1.0, 1.0, 64)
    total = torch.zeros(64)
    for seed in range(2000):
        total += tau * keep_mask(mixed_key(seed, 1), 0, 0.25, tau) / 0.25
    assert torch.allclose(total / 2000, tau, atol=5 * 3**0.5 / 2000**0.5)
