"""Every tensor has one rank, the parts are even, and folding keeps the order of the plan."""

from types import SimpleNamespace
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st

from drift_merge.engine.ranks.division import part_of, share_of
from drift_merge.engine.ranks.folding import fold
from drift_merge.storage.shards import lay_out


def plan_of(sizes: list[int], max_shard_bytes: int) -> Any:
    layout = lay_out(
        [(f"t{i}", "U8", (size,)) for i, size in enumerate(sizes)],
        stem="model",
        max_shard_bytes=max_shard_bytes,
        metadata={},
    )
    steps = [
        SimpleNamespace(name=name, shape=i.shape, inputs=()) for name, i in layout.tensors.items()
    ]
    return SimpleNamespace(steps=steps, layout=layout)


@given(
    st.lists(st.integers(0, 50), min_size=1, max_size=40),
    st.integers(1, 9),
    st.integers(1, 200),
    st.booleans(),
)
def test_every_tensor_is_made_by_one_rank_and_whole_shards_stay_whole(
    sizes: list[int], size: int, max_shard_bytes: int, whole: bool
) -> None:
    plan = plan_of(sizes, max_shard_bytes)
    shares = [share_of([plan], rank, size, whole_shards=whole) for rank in range(size)]
    assert sorted(name for share in shares for name in share) == sorted(plan.layout.tensors)
    if whole:
        for share in shares:
            files = {plan.layout.tensors[name].shard for name in share}
            assert {n for n, i in plan.layout.tensors.items() if i.shard in files} == share
    largest = max(max(1, each) for each in sizes)
    for share in shares if not whole else ():
        bytes_ = sum(max(1, plan.layout.tensors[name].size_bytes) for name in share)
        assert bytes_ <= sum(max(1, each) for each in sizes) / size * 1.1 + largest + 1


@given(st.lists(st.integers(0, 9), max_size=30), st.integers(1, 8))
def test_parts_are_runs_that_follow_each_other(sizes: list[int], size: int) -> None:
    found = [
        each for rank in range(size) for each in list(range(len(sizes)))[part_of(sizes, rank, size)]
    ]
    assert found == list(range(len(sizes)))


def test_sums_of_floats_are_folded_in_the_order_of_the_keys() -> None:
    found = {"b": torch.tensor([1e8]), "a": torch.tensor([1.0]), "c": torch.tensor([-1e8])}
    groups = dict.fromkeys("abc", "all")
    assert fold(["a", "b", "c"], groups, found)["all"].item() == 0.0
    assert fold(["b", "c", "a"], groups, found)["all"].item() == 1.0
