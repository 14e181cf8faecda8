"""Plans which shards are downloaded from the Hub, when, and how long each stays on the disk.

Plain data from headers alone, like the plan: `--dry-run --stream` prints it. The outputs do not
depend on it; only the order of work does.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from drift_merge.errors import RecipeError
from drift_merge.plans.arrange import Group, arrange, stays
from drift_merge.plans.plan import Plan, Step
from drift_merge.recipes.recipe import Recipe, active_survey
from drift_merge.storage.headers import TensorInfo
from drift_merge.storage.hub.ranges import Range
from drift_merge.storage.loans.leases import Lease, ShardRequest, shard_request
from drift_merge.storage.sources import RemoteShard

Ticket = tuple[int, str]  # number of the pass over the inputs, output tensor
Steps = list[tuple[Plan, Step]]  # that make one tensor, in one or several outputs
Tensors = dict[str, TensorInfo]  # of one shard, by stored name


@dataclass(frozen=True, slots=True)
class Transfers:
    """What is downloaded, in order, and which tensors are made of it."""

    passes: tuple[int | None, ...]  # number of the plan that looks at its inputs; None: the work
    ranks: Mapping[Ticket, int]  # in which order to work
    tickets: Mapping[Ticket, tuple[int, ...]]  # numbers of leases
    leases: tuple[Lease, ...]
    limit_bytes: int

    @property
    def num_shards(self) -> int:
        """Shards of which something is fetched."""
        return len({lease.request.shard for lease in self.leases})

    @property
    def num_parts(self) -> int:
        """Shards of which only ranges are fetched."""
        whole = {lease.request.shard for lease in self.leases if not lease.request.ranges}
        return self.num_shards - len(whole)

    @property
    def download_bytes(self) -> int:
        """Bytes that travel, those that travel again included."""
        return sum(lease.request.size_bytes for lease in self.leases)

    @property
    def again_bytes(self) -> int:
        """Bytes that travel again because the limit does not let them stay."""
        return sum(lease.again_bytes for lease in self.leases)

    @property
    def cache_bytes(self) -> int:
        """Most that can lie on the disk at a time."""
        return min(self.limit_bytes, self.download_bytes)


@dataclass(frozen=True, slots=True)
class _Work:
    """The making (or measuring) of one tensor, in one pass over the inputs."""

    ticket: Ticket
    num_outputs: int  # of a sweep; they are made in one go, or one after the other
    needed: Mapping[int, Tensors]  # by number of the shard

    @property
    def group(self) -> Group:
        """The numbers of the shards."""
        return frozenset(self.needed)


def plan_transfers(
    plans: Sequence[Plan],
    *,
    limit_bytes: int,
    finished: Sequence[Collection[str]] = (),
    share: Collection[str] | None = None,
) -> Transfers | None:
    """Plan the transfers of plans with equal sources that are executed in one pass.

    Args:
        plans: what will be done.
        limit_bytes: of all shards that lie on the disk at a time.
        finished: for each plan the output tensors that are done already; () for none.
        share: output tensors that this process looks at and makes; None for all.

    Returns:
        None if all that is needed is on this disk.

    Raises:
        RecipeError: the limit does not hold the shards that one tensor needs; says how many bytes.
    """
    passes = _passes(plans)
    works, shards = _collect(passes, plans, finished or [()] * len(plans), share)
    if not shards:
        return None
    sizes = [need.size_bytes for need in _needs(works, dict(enumerate(shards))).values()]
    _require_limit(works, shards, sizes, limit_bytes)
    # In their natural order: the last pass holds all groups, unless some of its work is done.
    groups = list(dict.fromkeys(work.group for work in sorted(works, key=_last_pass_first)))
    order = arrange(groups, sizes, limit_bytes, _sides(plans[0], shards))
    stages = _stages(works, order, len(passes))
    return _grant(passes, stages, shards, sizes, limit_bytes)


def num_walks(recipe: Recipe) -> int:
    """How often a method looks at all its inputs before any tensor is made."""
    survey = active_survey(recipe)
    return survey.walks if survey else 0


def _passes(plans: Sequence[Plan]) -> tuple[int | None, ...]:
    walks = [number for number, plan in enumerate(plans) for _ in range(num_walks(plan.recipe))]
    return (*walks, None)


def _collect(
    passes: Sequence[int | None],
    plans: Sequence[Plan],
    finished: Sequence[Collection[str]],
    share: Collection[str] | None,
) -> tuple[list[_Work], list[RemoteShard]]:
    """All work of all passes, and the shards on the Hub that it needs."""
    numbers: dict[RemoteShard, int] = {}
    works = []
    for ticket, steps in _tickets(passes, plans, finished):
        if share is not None and ticket[1] not in share:
            continue
        needed: dict[int, Tensors] = {}
        for shard, info in _remote_tensors(steps):
            number = numbers.setdefault(shard, len(numbers))
            needed.setdefault(number, {})[info.name] = info
        works.append(_Work(ticket, len(steps), needed))
    return works, list(numbers)


def _needs(works: Iterable[_Work], shards: Mapping[int, RemoteShard]) -> dict[int, ShardRequest]:
    """What some work needs of some shards, both by number."""
    tensors: dict[int, Tensors] = {number: {} for number in shards}
    for work in works:
        for number in tensors.keys() & work.needed.keys():
            tensors[number] |= work.needed[number]
    return {
        number: shard_request(shards[number], found.values()) for number, found in tensors.items()
    }


def _tickets(
    passes: Sequence[int | None], plans: Sequence[Plan], finished: Sequence[Collection[str]]
) -> Iterator[tuple[Ticket, Steps]]:
    for number, owner in enumerate(passes):
        if owner is not None:
            plan = plans[owner]
            for step in plan.parameters:
                yield (number, step.name), [(plan, step)]
            continue
        by_name: dict[str, Steps] = {}
        for plan, done in zip(plans, finished, strict=True):
            for step in plan.steps:
                if step.name not in done:
                    by_name.setdefault(step.name, []).append((plan, step))
        yield from (((number, name), steps) for name, steps in by_name.items())


def _remote_tensors(steps: Steps) -> Iterator[tuple[RemoteShard, TensorInfo]]:
    """The stored tensors that steps read and that are on the Hub."""
    for plan, step in steps:
        for view in step.inputs:
            checkpoint = plan.sources[view.source]
            names = {part.name for part in view.parts}
            if view.adapter is not None:
                names.update(view.adapter.names)
            if view.scale:
                names.add(view.scale)
            for name in sorted(names):
                info = checkpoint.tensors[name]
                if info.shard in checkpoint.remote:
                    yield checkpoint.remote[info.shard], info


def _last_pass_first(work: _Work) -> int:
    return -work.ticket[0]


def _require_limit(
    works: Iterable[_Work], shards: Sequence[RemoteShard], sizes: Sequence[int], limit_bytes: int
) -> None:
    least, work = max(
        ((sum(sizes[number] for number in work.needed), work) for work in works),
        key=lambda found: found[0],
    )
    if least <= limit_bytes:
        return
    files = ", ".join(shards[number].file for number in sorted(work.needed))
    raise RecipeError(
        f"--cache-limit is {limit_bytes:,} bytes, but {work.ticket[1]} needs {least:,} bytes of "
        f"shards at the same time ({files}).",
        remedy=f"Allow at least that much: --cache-limit {-(-least // 10**6)}MB  "
        "(more lets downloads run ahead of the work)",
    )


def _sides(plan: Plan, shards: Sequence[RemoteShard]) -> list[list[int]]:
    """The numbers of the shards of each source, in the order of its files."""
    numbers = {shard: number for number, shard in enumerate(shards)}
    remote = [[source.remote[name] for name in sorted(source.remote)] for source in plan.sources]
    return [[numbers[shard] for shard in listed if shard in numbers] for listed in remote]


Stages = list[tuple[Group, list[_Work]]]


def _stages(works: Iterable[_Work], order: Iterable[Group], num_passes: int) -> Stages:
    """The work of all passes in order; every other pass goes back the way the next one comes."""
    of_pass: list[dict[Group, list[_Work]]] = [{} for _ in range(num_passes)]
    for work in works:
        of_pass[work.ticket[0]].setdefault(work.group, []).append(work)
    stages: Stages = []
    for number, found in enumerate(of_pass):
        own = [(group, found[group]) for group in order if group in found]
        stages += own if (num_passes - 1 - number) % 2 == 0 else own[::-1]
    return stages


def _grant(
    passes: tuple[int | None, ...],
    stages: Stages,
    shards: Sequence[RemoteShard],
    sizes: Sequence[int],
    limit_bytes: int,
) -> Transfers:
    """Turn stays at hand into leases, and say which of them each work uses."""
    leases: list[Lease] = []
    at: list[dict[int, int]] = [{} for _ in stages]  # shard -> lease, by stage
    fetched: dict[int, list[Range]] = {}
    for stay in stays([group for group, _ in stages], sizes, limit_bytes):
        used = [n for n in range(stay.first, stay.last + 1) if stay.thing in stages[n][0]]
        works = [work for n in used for work in stages[n][1]]
        # A shard that comes more than once need not come as a whole each time.
        need = _needs(works, {stay.thing: shards[stay.thing]})[stay.thing]
        extent = need.ranges or ((0, need.shard.file_bytes),)
        before = fetched.setdefault(stay.thing, [])
        for stage in used:
            at[stage][stay.thing] = len(leases)
        uses = sum(work.num_outputs for work in works)
        leases.append(Lease(need, uses, overlap_bytes(extent, before)))
        before += extent
    ranks = {work.ticket: n for n, (_, found) in enumerate(stages) for work in found}
    tickets = {
        work.ticket: tuple(sorted(at[n][thing] for thing in group))
        for n, (group, found) in enumerate(stages)
        for work in found
    }
    return Transfers(passes, ranks, tickets, tuple(leases), limit_bytes)


def overlap_bytes(ranges: Iterable[Range], others: Iterable[Range]) -> int:
    """Bytes of some ranges, which do not overlap each other, that are in any of the others."""
    joined: list[Range] = []
    for begin, end in sorted(others):
        if joined and begin <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
        else:
            joined.append((begin, end))
    return sum(max(0, min(e, end) - max(b, begin)) for b, e in joined for begin, end in ranges)
