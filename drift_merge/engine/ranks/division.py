"""Which rank makes which tensor: contiguous runs in the order of the output files, equal in bytes.

The cuts depend on the plan and the number of ranks alone. They fall between output shards where
that costs little, so that most files have one writer; on a file system where two hosts cannot
write to one page of a file, always.
"""

from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate

from drift_merge.names.tensors import matrix_shape
from drift_merge.plans.plan import Plan, Step
from drift_merge.storage.headers import tensor_bytes

_SLACK = 0.05  # of a rank's bytes, to have a cut between two shards


def share_of(plans: Sequence[Plan], rank: int, size: int, *, whole_shards: bool) -> frozenset[str]:
    """The output tensors of one rank, in all plans of a run alike.

    Args:
        plans: with equal sources; those of a sweep share a walk over the inputs.
        rank: in [0, size).
        size: number of ranks.
        whole_shards: no two ranks may write to one file.
    """
    names, costs, starts = _weighed(plans)
    marks = list(accumulate(costs, initial=0))
    cuts = [_cut(marks, starts, number, size, whole_shards) for number in range(size + 1)]
    return frozenset(names[cuts[rank] : cuts[rank + 1]])


def part_of(sizes: Sequence[int], rank: int, size: int) -> slice:
    """The run of things that is one rank's, equal in the sum of their sizes."""
    marks = list(accumulate((max(1, each) for each in sizes), initial=0))
    begin, end = (_cut(marks, (0,), number, size, False) for number in (rank, rank + 1))
    return slice(begin, end)


def _weighed(plans: Sequence[Plan]) -> tuple[list[str], list[int], list[int]]:
    """Names in file order, bytes that each moves, and where files begin in all outputs."""
    costs: dict[str, int] = {}
    for plan in plans:
        for step in plan.steps:
            costs[step.name] = costs.get(step.name, 0) + _cost(plan, step)
    names = list(costs)
    place = {name: number for number, name in enumerate(names)}
    common: set[int] | None = None
    for plan in plans:
        found, shard = {0, len(names)}, ""
        for step in plan.steps:
            file = plan.layout.tensors[step.name].shard
            if file != shard:
                found.add(place[step.name])
            shard = file
        common = found if common is None else common & found
    return names, [costs[name] for name in names], sorted(common or {0})


def _cost(plan: Plan, step: Step) -> int:
    """Bytes read and written; the smallest is 1, so that every tensor has its place."""
    rows, cols = matrix_shape(step.shape)
    read = sum(
        tensor_bytes(plan.info(view.parts[0], view.source).dtype, (rows, cols))
        for view in step.inputs
    )
    return max(1, read + plan.layout.tensors[step.name].size_bytes)


def _cut(marks: Sequence[int], starts: Sequence[int], number: int, size: int, whole: bool) -> int:
    """The number of the tensor at which the part of rank `number` begins."""
    if number == size:
        return len(marks) - 1
    target = marks[-1] * number / size
    tensor = _nearest(marks, target, range(len(marks)))
    shard = _nearest(marks, target, starts)
    near = abs(marks[shard] - target) <= _SLACK * marks[-1] / size
    return shard if whole or near else tensor


def _nearest(marks: Sequence[int], target: float, places: Sequence[int]) -> int:
    """The place (ascending) whose mark is nearest to the target."""
    after = bisect_left(places, target, key=lambda place: marks[place])
    near = places[max(after - 1, 0) : after + 1]
    return min(near, key=lambda place: abs(marks[place] - target))
