"""A layout that follows tensors through stacking, joining, cutting and turning, against torch."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from drift_merge.training.match.boxes import Layout, cut, deal, join, parts_of, stack, swap, whole


def gather(layout: Layout, stored: dict[str, torch.Tensor]) -> torch.Tensor:
    """The tensor that the parts of a layout describe, element by element."""
    rows, cols = (
        (math.prod(layout.shape), 1)
        if len(layout.shape) < 2
        else (math.prod(layout.shape[:-1]), layout.shape[-1])
    )
    found = torch.full((rows, cols), -1)
    for part in parts_of(layout):
        flat = stored[part.name].reshape(-1)
        i, j = torch.arange(part.rows)[:, None], torch.arange(part.cols)
        place = found[part.row : part.row + part.rows, part.col : part.col + part.cols]
        assert (place == -1).all(), "covered twice"
        place.copy_(flat[part.offset + i * part.row_stride + j * part.col_stride])
    return found.reshape(layout.shape)


def numbered(shapes: list[tuple[int, ...]]) -> tuple[dict[str, torch.Tensor], list[Layout]]:
    """Tensors whose every element is another, and their layouts."""
    stored, begin = {}, 0
    for number, shape in enumerate(shapes):
        stored[f"t{number}"] = torch.arange(begin, begin + math.prod(shape)).reshape(shape)
        begin += math.prod(shape)
    return stored, [whole(name, tuple(tensor.shape)) for name, tensor in stored.items()]


@given(
    shape=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    steps=st.lists(
        st.tuples(st.sampled_from(["stack", "join", "cut", "swap", "deal"]), st.integers(0, 3)),
        max_size=4,
    ),
    data=st.data(),
)
def test_any_sequence_of_operations_equals_torch(shape, steps, data):
    stored, layouts = numbered([tuple(shape)] * 4)
    tensors = list(stored.values())
    for kind, where in steps:
        dim = where % tensors[0].ndim
        if kind == "stack":
            layouts = [stack(layouts[i : i + 2], dim) for i in range(0, len(layouts), 2)]
            tensors = [torch.stack(tensors[i : i + 2], dim) for i in range(0, len(tensors), 2)]
        elif kind == "join":
            layouts = [join(layouts[::-1], dim)]
            tensors = [torch.cat(tensors[::-1], dim)]
        elif kind == "cut":
            first = data.draw(st.integers(0, tensors[0].shape[dim]))
            sizes = [first, tensors[0].shape[dim] - first]
            if 0 in sizes:
                continue
            layouts = [cut(layout, dim, sizes)[1] for layout in layouts]
            tensors = [tensor.split(sizes, dim)[1] for tensor in tensors]
        elif kind == "deal":
            if tensors[0].shape[dim] % 2:
                continue
            layouts = [deal(layout, dim) for layout in layouts]
            tensors = [
                torch.cat([t.transpose(0, dim)[i::2].transpose(0, dim) for i in (0, 1)], dim)
                for t in tensors
            ]
        else:
            other = (dim + 1) % tensors[0].ndim
            layouts = [swap(layout, dim, other) for layout in layouts]
            tensors = [tensor.transpose(dim, other) for tensor in tensors]
    for layout, tensor in zip(layouts, tensors, strict=True):
        assert layout.shape == tuple(tensor.shape)
        assert torch.equal(gather(layout, stored), tensor)


def test_rows_that_go_together_are_one_part():
    """One part for each of the joined tensors of each expert, none for each row."""
    _, layouts = numbered([(8, 5)] * 6)
    fused = join([stack(layouts[:3], 0), stack(layouts[3:], 0)], 1)
    assert fused.shape == (3, 16, 5)
    assert len(parts_of(fused)) == 6
    again = join(cut(whole("t", (12, 5)), 0, [4, 8]), 0)
    assert len(parts_of(again)) == 1


def test_what_does_not_fit_is_refused():
    _, (one, other) = numbered([(2, 3), (2, 4)])
    with pytest.raises(ValueError, match="other shapes"):
        join([one, other], 0)
    with pytest.raises(ValueError, match="cannot be cut"):
        cut(one, 0, [1, 2])
    with pytest.raises(ValueError, match="3 rows"):
        deal(one, 1)
