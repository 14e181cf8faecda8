"""Codes and scales against a naive float64 reference, and the laws that any row obeys."""

from math import inf, nan

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from drift_merge.maths import compression
from drift_merge.maths.compression import (
    LARGEST,
    StoredSums,
    compress_rows,
    decompress_rows,
    row_scales,
    widen,
)
from tests import reference_compression as reference
from tests.strategies import quick

NAMES = {torch.int8: "int8", torch.float8_e4m3fn: "float8_e4m3fn"}
HUGE = torch.finfo(torch.float32).max
TINY = 2.0**-149  # the smallest subnormal

dtypes = st.sampled_from(list(LARGEST))
values = (
    st.floats(-HUGE, HUGE, width=32)
    | st.floats(-1.0, 1.0, width=32)
    | st.sampled_from((0.0, -0.0, TINY, -TINY, 2.0**-126, -(2.0**-130), 63.5, 0.5, HUGE, -HUGE))
)


@st.composite
def matrices(draw):
    """(R, C), float32: rows of one size of numbers each, some of them zero."""
    rows, cols = draw(st.integers(1, 4)), draw(st.integers(1, 9))
    found = []
    for _ in range(rows):
        row = draw(st.lists(values, min_size=cols, max_size=cols))
        found.append([0.0] * cols if draw(st.integers(0, 5)) == 0 else row)
    return torch.tensor(found, dtype=torch.float32)


def numbers(tensor):
    return tensor.double().tolist()


@given(matrices(), dtypes)
@quick
def test_scales_are_the_largest_magnitude_of_the_row_over_the_largest_code(rows, dtype):
    for row, found in zip(numbers(rows), numbers(row_scales(rows, dtype)), strict=True):
        exact = reference.scale(row, NAMES[dtype])
        assert exact * (1 - reference.SCALE_ERROR) <= found <= exact
        assert found >= reference.SMALLEST_SCALE


@given(matrices(), dtypes)
@quick
def test_every_code_is_the_nearest_to_x_over_scale(rows, dtype):
    codes, scales = compress_rows(rows, dtype)
    assert codes.dtype == dtype
    assert scales.dtype == torch.float32
    for row, coded, scale in zip(numbers(rows), numbers(codes), numbers(scales), strict=True):
        for x, code in zip(row, coded, strict=True):
            quotient = x / scale
            slack = abs(quotient) * (reference.QUOTIENT_ERROR + reference.SCALE_ERROR)
            nearest = reference.distance_to_nearest(quotient, NAMES[dtype])
            assert abs(code - quotient) <= nearest + slack


@given(matrices(), dtypes)
@quick
def test_what_comes_back_is_never_larger_than_its_row_was_and_so_finite(rows, dtype):
    found = decompress_rows(*compress_rows(rows, dtype))
    assert found.dtype == torch.float32
    assert (found.abs().amax(1) <= rows.abs().amax(1)).all()


@given(matrices())
@quick
def test_int8_is_off_by_half_a_step_at_most(rows):
    codes, scales = compress_rows(rows, torch.int8)
    error = (decompress_rows(codes, scales).double() - rows.double()).abs()
    # Half a step; the shrunk scale and the rounding of quotient and product add a trifle.
    assert (error <= scales.double()[:, None] * (0.5 + 127 * 2.0**-21)).all()


@given(matrices(), dtypes)
@quick
def test_zeros_stay_zeros_and_rows_of_zeros_are_safe(rows, dtype):
    found = decompress_rows(*compress_rows(rows, dtype))
    assert (found[rows == 0.0] == 0.0).all()
    nothing = torch.zeros(2, 3)
    codes, scales = compress_rows(nothing, dtype)
    assert torch.equal(decompress_rows(codes, scales), nothing)
    assert torch.isfinite(scales).all()


@given(matrices(), dtypes)
@quick
def test_the_negated_row_has_the_negated_codes(rows, dtype):
    codes, scales = compress_rows(rows, dtype)
    negated, same = compress_rows(-rows, dtype)
    assert torch.equal(same, scales)
    assert torch.equal(negated.float(), -codes.float())


@given(matrices(), dtypes)
@quick
def test_compressing_what_came_back_moves_no_code(rows, dtype):
    codes, scales = compress_rows(rows, dtype)
    again, _ = compress_rows(decompress_rows(codes, scales), dtype)
    assert torch.equal(again.float(), codes.float())


@given(matrices(), dtypes)
@quick
def test_a_row_does_not_depend_on_its_neighbors(rows, dtype):
    codes, scales = compress_rows(rows, dtype)
    for number in range(len(rows)):
        alone, scale = compress_rows(rows[number : number + 1], dtype)
        assert torch.equal(alone.view(torch.uint8), codes[number : number + 1].view(torch.uint8))
        assert torch.equal(scale, scales[number : number + 1])


@pytest.mark.parametrize("dtype", LARGEST)
@pytest.mark.parametrize("piece", [1, 5, 64, 2**20])
def test_any_size_of_pieces_gives_the_same_bytes(monkeypatch, dtype, piece):
    torch.manual_seed(0)
    rows = torch.randn(17, 13)
    codes, scales = compress_rows(rows, dtype)
    back = decompress_rows(codes, scales)
    monkeypatch.setattr(compression, "_PIECE", piece)
    found, same = compress_rows(rows, dtype)
    assert torch.equal(found.view(torch.uint8), codes.view(torch.uint8))
    assert torch.equal(same, scales)
    assert torch.equal(decompress_rows(codes, scales), back)


@pytest.mark.parametrize("dtype", LARGEST)
@pytest.mark.parametrize("bad", [nan, inf, -inf])
def test_the_scale_of_a_row_with_nan_or_inf_tells_so(dtype, bad):
    rows = torch.ones(3, 4)
    rows[1, 2] = bad
    _, scales = compress_rows(rows, dtype)
    assert torch.isfinite(scales).tolist() == [True, False, True]


def test_worked_examples_of_both_dtypes():
    rows = torch.tensor([[127.0, -64.0, 0.4, 0.6]])
    codes, scales = compress_rows(rows, torch.int8)
    assert codes.tolist() == [[127, -64, 0, 1]]
    assert scales.tolist() == [1.0 - 2.0**-22]
    rows = torch.tensor([[448.0, -16.9, 18.9, 2.0**-10]])
    codes, _ = compress_rows(rows, torch.float8_e4m3fn)
    assert codes.float().tolist() == [[448.0, -16.0, 18.0, 2.0**-9]]


@pytest.mark.parametrize("out", [torch.float32, torch.float64])
def test_widening_float8_by_the_table_is_the_conversion_of_all_256_codes(out):
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    found = widen(codes.view(16, 16), torch.empty(16, 16, dtype=out)).flatten()
    assert torch.equal(found.nan_to_num(nan=7.0), codes.to(out).nan_to_num(nan=7.0))
    assert int(found.isnan().sum()) == 2


@pytest.mark.parametrize("dtype", LARGEST)
def test_a_part_of_the_columns_and_a_wider_target_give_the_same_values(dtype):
    torch.manual_seed(0)
    codes, scales = compress_rows(torch.randn(6, 9), dtype)
    whole = decompress_rows(codes, scales)
    assert torch.equal(decompress_rows(codes[:, 2:7], scales), whole[:, 2:7])
    wide = torch.empty(6, 9, dtype=torch.float64)
    assert decompress_rows(codes, scales, wide) is wide
    assert torch.equal(wide, whole.double())


@given(matrices().filter(lambda rows: bool((rows.abs() < 1e15).all())), dtypes, st.integers(1, 7))
@quick
def test_norm_and_cosine_of_the_stored_form_are_those_of_float64(rows, dtype, chunk):
    stored = decompress_rows(*compress_rows(rows, dtype)).flatten()
    exact = rows.flatten()
    sums = StoredSums()
    for begin in range(0, exact.numel(), chunk):
        part = slice(begin, begin + chunk)
        sums.add(exact[part], stored[part].clone())
    one, other = exact.double().tolist(), stored.double().tolist()
    found = sums.summary()
    norm = float(stored.double().norm())
    # Squares below the smallest float32 vanish, and those of subnormals lose bits.
    assert found["norm_stored"] == pytest.approx(norm, rel=1e-5, abs=1e-21)
    if float(exact.double().norm()) > 1e-15 and norm > 1e-15:
        assert found["cosine_stored"] == pytest.approx(reference.cosine(one, other), abs=1e-6)


def test_a_zero_delta_has_no_cosine_and_a_lost_one_has_zero():
    sums = StoredSums()
    sums.add(torch.zeros(4), torch.zeros(4))
    assert sums.summary() == {"norm_stored": 0.0, "cosine_stored": None}
    sums = StoredSums()
    sums.add(torch.ones(4), torch.zeros(4))
    assert sums.summary() == {"norm_stored": 0.0, "cosine_stored": 0.0}
    sums.add(torch.full((1,), 1e30), torch.full((1,), 1e30))
    assert sums.summary() == {"norm_stored": None, "cosine_stored": None}
