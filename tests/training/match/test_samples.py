"""Pairs by recorded values: within the rounding of the live dtype, and only where they are sure."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from drift_merge.maths.measures import positions
from drift_merge.training.match.samples import find_partners, looks_like


def record(tensor, code="F32"):
    flat = tensor.flatten().double()
    return {
        "shape": list(tensor.shape),
        "dtype_mllm": code,
        "sample_mllm": [float(flat[i]) for i in positions(flat.numel())],
    }


def tensors(count, shape=(5, 4), seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {f"t{i}": torch.randn(shape, generator=generator) for i in range(count)}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_each_is_found_among_many_in_any_dtype(dtype):
    here = tensors(300)
    entries = {f"c{name}": record(tensor) for name, tensor in here.items()}
    found = find_partners(entries, {name: tensor.to(dtype) for name, tensor in here.items()})
    assert found == {f"c{name}": name for name in here}


@given(st.lists(st.integers(0, 3), min_size=1, max_size=8), st.integers(1, 8))
def test_pairs_are_those_that_a_search_of_all_finds(kinds, count):
    """Values repeat: what has two candidates, or is a candidate twice, is left alone."""
    values = list(tensors(4).values())
    here = {f"m{i}": values[kind] for i, kind in enumerate(kinds)}
    entries = {f"c{i}": record(values[i % 4]) for i in range(count)}
    wanted = {}
    for name, entry in entries.items():
        others = [other for other, tensor in here.items() if looks_like(tensor, entry)]
        rivals = [n for n, e in entries.items() if others and looks_like(here[others[0]], e)]
        if len(others) == 1 and rivals == [name]:
            wanted[name] = others[0]
    assert find_partners(entries, here) == wanted


def test_values_beyond_the_rounding_of_the_dtype_are_others():
    (tensor,) = tensors(1).values()
    assert looks_like(tensor.bfloat16(), record(tensor))
    assert looks_like((tensor * 1.02).bfloat16(), record(tensor)) is False
    assert looks_like(tensor * (1 + 1e-6), record(tensor)) is False
    assert looks_like(tensor.reshape(4, 5), record(tensor)) is False


def test_what_cannot_be_seen_is_not_judged():
    (tensor,) = tensors(1).values()
    sharded = tensor.clone()
    sharded.ds_id = 1
    for unseen in (None, tensor.to("meta"), tensor.to(torch.int8), sharded):
        assert looks_like(unseen, record(tensor)) is None
        assert find_partners({"c": record(tensor)}, {"m": unseen}) == {}
    not_finite = record(tensor) | {"sample_mllm": [None] * 8}
    assert looks_like(tensor, not_finite) is None
    assert find_partners({"c": not_finite}, {"m": tensor}) == {}
