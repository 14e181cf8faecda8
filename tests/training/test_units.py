"""Regions and their blocks: every element once, in the order of the flattened region."""

from math import prod

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from drift_merge.names.tensors import matrix_shape
from drift_merge.training.units import Origin, Region, Unit, blocks_of, region_shape
from tests.strategies import quick

shapes = st.lists(st.integers(1, 6), min_size=1, max_size=3).map(tuple)


def unit_of(shape):
    parameter = nn.Parameter(torch.empty(shape))
    return Unit("n", "p", parameter, "mlp", 0, shape, 0, Origin(0, 0, False))


@st.composite
def regions(draw):
    shape = draw(shapes)
    if draw(st.booleans()):
        begin = draw(st.integers(0, prod(shape)))
        end = draw(st.integers(begin, prod(shape)))
        return shape, Region(flat=(begin, end))
    bounds = []
    for size in shape:
        start = draw(st.integers(0, size))
        bounds.append(slice(start, draw(st.integers(start, size))))
    return shape, Region(slices=tuple(bounds))


def elements_of(shape, region):
    """The flat positions that a region holds, by torch itself."""
    positions = torch.arange(prod(shape))
    if region.flat is not None:
        return positions[slice(*region.flat)]
    return positions.view(shape)[region.slices].reshape(-1)


@quick
@given(regions(), st.integers(1, 9))
def test_blocks_are_the_region_in_its_order(pair, elements):
    shape, region = pair
    unit = unit_of(shape)
    _, cols = matrix_shape(shape)
    found = []
    for block in blocks_of(unit, region, elements):
        assert block.numel <= max(elements, block.cols)
        rows = range(block.row, block.row + block.rows)
        found += [r * cols + k for r in rows for k in range(block.col, block.col + block.cols)]
    expected = elements_of(shape, region)
    assert found == expected.tolist()
    assert prod(region_shape(unit, region)) == len(found)


def test_a_long_row_is_cut_too():
    unit = unit_of((1, 100))
    cuts = [(b.col, b.cols) for b in blocks_of(unit, Region(flat=(3, 100)), 40)]
    assert cuts == [(3, 40), (43, 40), (83, 17)]


@pytest.mark.parametrize("region", [Region(flat=(3, 100)), Region(slices=(slice(3, 100),))])
def test_a_vector_has_a_row_per_element(region):
    cuts = [(b.row, b.rows, b.col, b.cols) for b in blocks_of(unit_of((100,)), region, 40)]
    assert cuts == [(3, 40, 0, 1), (43, 40, 0, 1), (83, 17, 0, 1)]
