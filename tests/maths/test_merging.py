"""Merge formulas against the float64 reference, and the laws that they obey."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from drift_merge.maths.methods.elementwise import interpolate
from tests import reference
from tests.strategies import alike, dtypes, mixed, quick, unit_weights, weights


def merge(mllm, reasoners, factors, *, out=None):
    """What the stream does with one tensor: cast, combine, round; inputs are left alone."""
    compute = reference.compute_dtype(mllm.dtype, *(r.dtype for r in reasoners))
    loaded = [t.flatten().to(compute, copy=True) for t in (mllm, *reasoners)]
    return interpolate(loaded[0], loaded[1:], factors).to(out or mllm.dtype)


def same_bits(one, other):
    return one.view(torch.uint8).tolist() == other.view(torch.uint8).tolist()


@given(
    st.integers(1, 3).flatmap(
        lambda n: st.tuples(mixed(n + 1), st.lists(weights, min_size=n, max_size=n))
    ),
    dtypes,
)
@quick
def test_linear_is_within_the_derived_bound_of_the_reference(drawn, out):
    (mllm, *reasoners), factors = drawn
    if out == torch.float16:  # larger results have no float16
        mllm, *reasoners = (t.double().clamp(-8e3, 8e3).to(t.dtype) for t in (mllm, *reasoners))
    compute = reference.compute_dtype(mllm.dtype, *(r.dtype for r in reasoners))
    lists = [reference.numbers(t) for t in (mllm, *reasoners)]
    exact = reference.linear(lists[0], lists[1:], factors)
    found = reference.numbers(merge(mllm, reasoners, factors, out=out))
    for index, (one, other) in enumerate(zip(found, exact, strict=True)):
        own, *others = (values[index] for values in lists)
        if abs(other) > torch.finfo(out).max / 2:
            continue
        bound = reference.linear_bound(own, others, factors, compute, out)
        assert abs(one - other) <= bound


def test_a_weight_below_float32_is_off_by_its_grid_and_no_more():
    huge, weight = 2.0**125, 2.0**-150
    found = merge(torch.zeros(1), [torch.tensor([huge])], [weight])
    bound = reference.linear_bound(0.0, [huge], [weight], torch.float32, torch.float32)
    assert abs(float(found) - weight * huge) <= bound < 1e-6


@given(alike(1), st.lists(weights, min_size=1, max_size=3))
@quick
def test_equal_inputs_give_exactly_that_input_signed_zeros_included(one, factors):
    merged = merge(one[0], [one[0].clone() for _ in factors], factors)
    assert same_bits(merged, one[0].flatten())


@given(mixed(2))
@quick
def test_weight_one_gives_the_reasoner_bit_for_bit(pair):
    mllm, reasoner = pair
    assert same_bits(merge(mllm, [reasoner], [1.0], out=reasoner.dtype), reasoner.flatten())


@given(alike(3))
@quick
def test_weight_zero_among_others_adds_nothing(three):
    mllm, one, other = three
    assert torch.equal(merge(mllm, [one, other], [0.3, 0.0]), merge(mllm, [one], [0.3]))


@given(alike(4, edges=False), st.lists(unit_weights, min_size=3, max_size=3))
@quick
def test_permuting_reasoners_with_their_weights_changes_nothing_beyond_rounding(four, factors):
    mllm, *reasoners = four
    expected = merge(mllm, reasoners, factors, out=torch.float64)
    lists = [reference.numbers(t) for t in (mllm, *reasoners)]
    compute = reference.compute_dtype(mllm.dtype)
    for order in itertools.permutations(range(3)):
        found = merge(
            mllm, [reasoners[i] for i in order], [factors[i] for i in order], out=torch.float64
        )
        for index, (one, other) in enumerate(zip(found.tolist(), expected.tolist(), strict=True)):
            own, *others = (values[index] for values in lists)
            # Each order is within the bound of the exact value.
            assert abs(one - other) <= 2 * reference.linear_bound(
                own, others, factors, compute, compute
            )


@given(alike(3), st.lists(unit_weights, min_size=2, max_size=2))
@quick
def test_finite_inputs_and_weights_in_the_unit_interval_give_finite_outputs(three, factors):
    total = sum(factors)
    factors = [f / total for f in factors] if total > 1 else factors
    assert torch.isfinite(merge(three[0], three[1:], factors)).all()


@given(alike(2, edges=False), st.floats(0.0, 1.0))
@quick
def test_an_interpolation_stays_between_its_ends(pair, factor):
    mllm, reasoner = pair
    merged = merge(mllm, [reasoner], [factor])
    low, high = torch.minimum(*pair).flatten(), torch.maximum(*pair).flatten()
    slack = 2 * torch.finfo(mllm.dtype).eps * torch.maximum(low.abs(), high.abs())
    assert ((merged >= low - slack) & (merged <= high + slack)).all()


def test_a_worked_example_with_two_reasoners():
    merged = merge(
        torch.tensor([1.0, 0.0]), [torch.tensor([3.0, 8.0]), torch.tensor([5.0, -4.0])], [0.5, 0.25]
    )
    assert merged.tolist() == [3.0, 3.0]  # 0.25 * 1 + 0.5 * 3 + 0.25 * 5 and 0.5 * 8 - 0.25 * 4


def test_weights_and_reasoners_of_different_number_are_refused():
    with pytest.raises(ValueError, match="zip"):
        interpolate(torch.ones(2), [torch.ones(2)], [0.1, 0.2])
