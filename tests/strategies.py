"""Hypothesis strategies: shapes at the edges, dtypes, and values where rounding goes wrong."""

from math import prod

import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

from tests.reference import DTYPES

quick = settings(max_examples=60)  # beside the profile of conftest.py
few = settings(max_examples=12)

SHAPES = ((), (1,), (0, 5), (5, 0), (3,), (2, 3), (7, 1), (1, 13), (2, 3, 5), (31,))
# Signed zeros, the smallest subnormals of float16, bfloat16 and float32, halfway cases of
# bfloat16 rounding, and values that float16 cannot hold are made finite by `tensors`.
EDGES = (
    *(0.0, -0.0, 1.0, -1.0, 0.1, -0.02),
    *(2.0**-24, -(2.0**-133), 2.0**-149, -1.1754943508222875e-38),
    *(1.00390625, 1.01171875, 3.0e4, -3.0e4, 1e18, -8e37),
)

_SPECIAL = "ab09 ._-/:\\\"'\n\r\t\0\x85\u2028\u2029\ufeff\u0301\u00e9\U0001f600"
_ALPHABET = "".join({*_SPECIAL, *map(chr, range(0x17F)), *map(chr, range(0x4E00, 0x4E40))})


def texts(*, min_size: int = 0, max_size: int) -> st.SearchStrategy[str]:
    """Any text of some hundred characters; of all, hypothesis makes a table in two seconds."""
    return st.text("".join(sorted(_ALPHABET)), min_size=min_size, max_size=max_size)


shapes = st.sampled_from(SHAPES)
dtypes = st.sampled_from(DTYPES)
weights = st.floats(-2.0, 2.0, allow_nan=False) | st.sampled_from((0.0, 1.0, 0.1, 0.5))
unit_weights = st.floats(0.0, 1.0) | st.sampled_from((0.0, 1.0, 0.1))
_ordinary = st.floats(-4.0, 4.0, width=32)


def tensors(shape: tuple[int, ...], dtype: torch.dtype, *, edges: bool = True) -> st.SearchStrategy:
    """Finite tensors of one shape and dtype, below a quarter of what the dtype can hold."""
    values = (st.sampled_from(EDGES) | _ordinary) if edges else _ordinary
    limit = torch.finfo(dtype).max / 4

    def build(numbers: list[float]) -> Tensor:
        exact = torch.tensor(numbers, dtype=torch.float64).clamp(-limit, limit)
        return exact.to(dtype).reshape(shape)

    size = prod(shape)
    return st.lists(values, min_size=size, max_size=size).map(build)


@st.composite
def mixed(draw: st.DrawFn, count: int) -> list[Tensor]:
    """`count` tensors of one shape, each of a dtype of its own."""
    shape = draw(shapes)
    return [draw(tensors(shape, draw(dtypes))) for _ in range(count)]


@st.composite
def alike(draw: st.DrawFn, count: int, *, edges: bool = True) -> list[Tensor]:
    """`count` tensors of one shape and one dtype."""
    shape, dtype = draw(shapes), draw(dtypes)
    return [draw(tensors(shape, dtype, edges=edges)) for _ in range(count)]
