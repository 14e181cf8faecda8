"""The prior of one tensor and what is measured of a pair, against the float64 reference."""

from math import isfinite, nan, prod

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from drift_merge.maths.differences import STATISTICS, PairSums, delta, delta_
from tests import reference
from tests.strategies import alike, dtypes, mixed, quick


def in_compute(*tensors):
    compute = reference.compute_dtype(*(t.dtype for t in tensors))
    return [t.flatten().to(compute) for t in tensors]


def sums_of(reasoner, mllm, *, chunk=7, has_base=False):
    sums = PairSums(has_base=has_base)
    for begin in range(0, reasoner.numel(), chunk):
        ours, theirs = reasoner[begin : begin + chunk], mllm[begin : begin + chunk]
        sums.add_pair(ours, theirs)
        sums.add_delta(ours - theirs, torch.empty_like(ours))
    return sums


@given(mixed(2), dtypes)
@quick
def test_delta_is_within_one_rounding_of_the_reference_in_every_mix_of_dtypes(pair, out):
    reasoner, mllm = in_compute(*pair)
    if out == torch.float16:  # keep the result inside its range
        reasoner, mllm = (t.clamp(-3e4, 3e4) for t in (reasoner, mllm))
    exact = reference.delta(reference.numbers(reasoner), reference.numbers(mllm))
    found = reference.numbers(delta(reasoner, mllm).to(out))
    for one, other in zip(found, exact, strict=True):
        assert abs(one - other) <= reference.delta_bound(other, reasoner.dtype, out)


@given(mixed(2))
@quick
def test_the_streamed_form_equals_the_plain_one_and_overwrites_only_the_reasoner(pair):
    reasoner, mllm = in_compute(*pair)
    expected, before = delta(reasoner, mllm), mllm.clone()
    result = delta_(reasoner, mllm)
    assert result is reasoner
    assert torch.equal(result, expected)
    assert torch.equal(mllm, before)


@given(alike(2))
@quick
def test_adding_delta_moves_the_mllm_to_the_reasoner(pair):
    reasoner, mllm = in_compute(*pair)
    step = delta(reasoner, mllm)
    for own, moved, target in zip(
        *(reference.numbers(t) for t in (mllm, mllm + step, reasoner)), strict=True
    ):
        # Two roundings: of the subtraction and of the addition.
        bound = reference.half_ulp(abs(own) + abs(target), mllm.dtype)
        assert abs(moved - target) <= 2 * bound
        assert (target - own) * (moved - own) >= 0


@given(alike(2))
@quick
def test_swapping_the_models_negates_delta(pair):
    assert torch.equal(delta(*pair), -delta(*reversed(pair)))


@given(alike(1))
@quick
def test_delta_of_equal_models_is_zero(one):
    assert not delta(one[0], one[0].clone()).any()


@given(st.integers(0, 2**32), st.sampled_from((1, 5, 1000, 2**17, 2**17 + 3)), st.floats(-6, 6))
@quick
def test_sums_are_within_1e_minus_5_of_float64(seed, numel, magnitude):
    generator = torch.Generator().manual_seed(seed)
    mllm = torch.randn(numel, generator=generator) * 10.0**magnitude
    reasoner = mllm + 0.2 * 10.0**magnitude * torch.randn(numel, generator=generator)
    found = sums_of(reasoner, mllm, chunk=2**17, has_base=True)
    ours, theirs = reasoner.double(), mllm.double()
    step = (reasoner - mllm).double()
    for value, exact in (
        (found.reasoner_squared, ours @ ours),
        (found.mllm_squared, theirs @ theirs),
        (found.delta_squared, step @ step),
    ):
        assert value == pytest.approx(float(exact), rel=1e-5)
    scale = float(ours.norm() * theirs.norm())
    assert abs(found.product - float(ours @ theirs)) <= 1e-5 * scale
    assert found.delta_max == float(step.abs().max())


@given(alike(2, edges=False), st.integers(1, 9), st.booleans())
@quick
def test_statistics_agree_with_the_reference_for_any_chunk_size(pair, chunk, has_base):
    reasoner, mllm = (t.flatten().double() for t in pair)
    found = sums_of(reasoner, mllm, chunk=chunk, has_base=has_base).summary()
    lists = [reference.numbers(t) for t in (reasoner, mllm, reasoner - mllm)]
    expected = reference.statistics(*lists)
    assert list(found) == list(STATISTICS) == list(expected)
    # The law of cosines divides by the smaller norm what was rounded beside the larger one.
    norms = expected["norm_reasoner"], expected["norm_mllm"]
    skew = max(norms) / min(norms) if min(norms) else 1.0
    for name, value in expected.items():
        slack = 1e-14 * skew if name == "cosine" else 1e-15
        near = value if value is None else pytest.approx(value, rel=1e-12, abs=slack)
        assert found[name] == near, name
    assert -1.0 <= found["cosine"] <= 1.0


@given(st.integers(0, 2**32), st.sampled_from((1e-1, 1e-2, 1e-3, 1e-4)))
@quick
def test_the_cosine_of_near_relatives_keeps_its_distance_from_one(seed, step):
    generator = torch.Generator().manual_seed(seed)
    mllm = torch.randn(5000, generator=generator)
    reasoner = mllm + step * torch.randn(5000, generator=generator)
    ours, theirs = reasoner.double(), mllm.double()
    exact = 1.0 - float(ours @ theirs / (ours.norm() * theirs.norm()))
    found = 1.0 - sums_of(reasoner, mllm, chunk=2**17).summary()["cosine"]
    assert found == pytest.approx(exact, rel=1e-3)


def test_a_worked_example_has_the_statistics_one_computes_by_hand():
    sums = sums_of(torch.tensor([3.0, 4.0, 0.0]), torch.tensor([4.0, 3.0, 0.0]))
    assert sums.summary() == {
        "norm_delta": pytest.approx(2**0.5),
        "norm_mllm": 5.0,
        "norm_reasoner": 5.0,
        "cosine": pytest.approx(24 / 25),
        "max_abs_delta": 1.0,
        "equal": pytest.approx(1 / 3),
    }


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_cosine_of_parallel_models_never_leaves_its_range(sign):
    values = torch.full((9,), 0.1)
    cosine = sums_of(values, sign * values).summary()["cosine"]
    assert cosine == pytest.approx(sign)
    assert abs(cosine) <= 1.0


def test_a_zero_model_has_cosine_zero_not_nan():
    found = sums_of(torch.zeros(4), torch.ones(4)).summary()
    assert found["cosine"] == 0.0
    assert all(isfinite(value) for value in found.values())


def test_an_empty_tensor_has_all_statistics_zero_and_no_share():
    assert set(PairSums().summary().values()) == {0.0, None}


def test_entries_that_were_filled_in_are_not_counted_as_equal():
    sums = sums_of(torch.tensor([1.0, 2.0, 5.0, 5.0]), torch.tensor([1.0, 3.0, 5.0, 5.0]))
    sums.num_filled = 2
    assert sums.summary()["equal"] == 0.5


@pytest.mark.parametrize("bad", [nan, float("inf"), -float("inf")])
@pytest.mark.parametrize("side", [0, 1])
def test_nonfinite_values_leave_no_statistics(bad, side):
    pair = [torch.ones(3), torch.ones(3)]
    pair[side][1] = bad
    sums = sums_of(*pair)
    assert not sums.is_finite
    assert set(sums.summary().values()) == {None}


def test_shapes_of_the_strategies_cover_scalars_and_empty_tensors():
    from tests.strategies import SHAPES

    assert {prod(shape) for shape in SHAPES} >= {0, 1}
    assert () in SHAPES
    assert (0, 5) in SHAPES
