"""How much of a change survives rounding, against the definition in float64."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from drift_merge.maths.measures import change_kept
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
    assert change_kept(before, exact, rounded) == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_nothing_is_lost_where_the_output_is_as_wide_as_the_sum():
    before, exact = torch.ones(3), torch.tensor([1.0, 1.1, 0.9])
    assert change_kept(before, exact, exact.clone()) == 1.0


def test_a_change_below_half_a_step_is_lost_and_one_above_it_is_doubled_nearly():
    before = torch.ones(1)
    for change, kept in ((0.003, 0.0), (0.0045, 0.0078125 / 0.0045)):
        exact = before + change
        assert change_kept(before, exact, exact.bfloat16()) == pytest.approx(kept, rel=1e-5)


@pytest.mark.parametrize("bad", [0.0, float("inf"), float("nan")])
def test_no_change_and_no_number_give_none(bad):
    before = torch.ones(4)
    exact = before.clone()
    exact[2] += bad
    assert change_kept(before, exact, exact.bfloat16()) is None
