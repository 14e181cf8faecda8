"""Rounding by chance, and how much of a change survives rounding, by their definitions."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from drift_merge.maths.rounding import change_kept, round_stochastically
from tests.strategies import quick


@given(st.integers(0, 2**32), st.floats(-7.0, 1.0))
@quick
def test_the_kept_fraction_is_the_projection_on_the_change(seed, magnitude):
    generator = torch.Generator().manual_seed(seed)
    before = torch.randn(1000, generator=generator).bfloat16().float()
    exact = before + 10.0**magnitude * torch.randn(1000, generator=generator)
    rounded = exact.bfloat16()
    step = (exact - before).double()
    expected = float((rounded.double() - before.double()) @ step / (step @ step))
    assert change_kept(before, exact, rounded).fraction == pytest.approx(
        expected, rel=1e-4, abs=1e-5
    )


def test_nothing_is_lost_where_the_output_is_as_wide_as_the_sum():
    before, exact = torch.ones(3), torch.tensor([1.0, 1.1, 0.9])
    assert change_kept(before, exact, exact.clone()).fraction == 1.0


def test_a_change_below_half_a_step_is_lost_and_one_above_it_is_doubled_nearly():
    before = torch.ones(1)
    for change, kept in ((0.003, 0.0), (0.0045, 0.0078125 / 0.0045)):
        exact = before + change
        assert change_kept(before, exact, exact.bfloat16()).fraction == pytest.approx(
            kept, rel=1e-5
        )


@pytest.mark.parametrize("bad", [0.0, float("inf"), float("nan")])
def test_no_change_and_no_number_give_none(bad):
    before = torch.ones(4)
    exact = before.clone()
    exact[2] += bad
    assert change_kept(before, exact, exact.bfloat16()) is None


KINDS = [torch.bfloat16, torch.float16]


def neighbors(x, dtype):
    """The two numbers of a dtype around a float64 number, by walking over all of them."""
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    numbers = patterns[torch.isfinite(patterns)].double().unique()
    place = int(torch.searchsorted(numbers, x, right=True))
    lower = numbers[place - 1]
    return float(lower), float(numbers[place] if x != lower else lower)


@pytest.mark.parametrize("dtype", KINDS)
@given(st.floats(-60000, 60000, width=32), st.integers(0, 2**62))
@quick
def test_the_result_is_one_of_the_two_neighbors_and_on_average_the_number(dtype, x, key):
    lower, upper = neighbors(x, dtype)
    draws = round_stochastically(torch.full((4096,), x), dtype, key, 17).double()
    assert set(draws.tolist()) <= {lower, upper}
    if lower != upper:
        chance = (x - lower) / (upper - lower)
        found = float((draws == upper).double().mean())
        # Five standard deviations of a mean of 4096 draws.
        assert abs(found - chance) <= 5 * (chance * (1 - chance) / 4096) ** 0.5 + 2.0**-23


@pytest.mark.parametrize("dtype", KINDS)
def test_what_the_dtype_holds_is_never_changed(dtype):
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    found = round_stochastically(patterns.float(), dtype, 3, 0)
    same = found.view(torch.int16) == patterns.view(torch.int16)
    assert bool((same | patterns.isnan()).all())
    assert bool((found.isnan() == patterns.isnan()).all())


@pytest.mark.parametrize("dtype", KINDS)
def test_the_draw_depends_on_key_and_position_alone(dtype):
    values = torch.randn(5000, generator=torch.Generator().manual_seed(0))
    whole = round_stochastically(values, dtype, 7, 0)
    parts = [round_stochastically(values[i : i + 777], dtype, 7, i) for i in range(0, 5000, 777)]
    assert torch.equal(torch.cat(parts), whole)
    assert not torch.equal(round_stochastically(values, dtype, 8, 0), whole)
    wide = round_stochastically(values.double(), dtype, 7, 0)
    assert torch.equal(wide, whole)


def test_a_change_too_small_for_nearest_is_kept_on_average():
    generator = torch.Generator().manual_seed(1)
    before = torch.randn(200_000, generator=generator).bfloat16().float()
    exact = before + 1e-4 * torch.randn(200_000, generator=generator)
    nearest = change_kept(before, exact, exact.bfloat16())
    drawn = change_kept(before, exact, round_stochastically(exact, torch.bfloat16, 5, 0))
    assert nearest.fraction < 0.2
    assert abs(drawn.fraction - 1.0) <= 5 * drawn.error
    assert 0.0 < drawn.error < 0.1
    assert drawn.noise > nearest.noise
