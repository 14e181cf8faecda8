"""Orders the work so that each shard is downloaded once, within a limit of disk space.

Shards are numbers here ("things"), each with a size; a group of work needs a set of them on the
disk at the same time. The best order is hard to find (it is a vertex separation of the graph of
shards), so some simple ones are tried out and the cheapest is taken.
"""

from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

Group = frozenset[int]  # the things that some work needs at the same time
Order = list[Group]


@dataclass(frozen=True, slots=True)
class Residence:
    """One thing at hand from the first of some stages to the last, both included."""

    thing: int
    first: int
    last: int


@dataclass(frozen=True, slots=True, order=True)
class OrderCost:
    """What an order costs; the first field counts most."""

    fetched: int  # sum of the sizes of all stays
    peak: int  # largest sum of sizes that must be at hand in a stage


def arrange(
    groups: Sequence[Group], sizes: Sequence[int], limit: int, sides: Sequence[Sequence[int]] = ()
) -> Order:
    """Order groups so that things are fetched as seldom as possible, and then held as briefly.

    Args:
        groups: distinct, in their natural order; each fits the limit.
        sizes: of all things.
        limit: of the sizes of what is at hand.
        sides: things that belong together, in their own order (the shards of one model).

    Returns:
        The same groups; those that need nothing come first.
    """
    free = [group for group in groups if not group]
    bound = [group for group in groups if group]
    best = bound
    cost = cost_of(best, sizes, limit)
    candidates: list[Callable[[], Order]] = [partial(finish_cheapest, bound, sizes)]
    candidates += [partial(tiled, bound, sizes, limit, side) for side in sides]
    for candidate in candidates:
        # Good enough: nothing is fetched twice, and there is room to fetch as much again ahead.
        if cost.fetched == sum(sizes) and 2 * cost.peak <= limit:
            break
        order = candidate()
        found = cost_of(order, sizes, limit)
        if found < cost:
            best, cost = order, found
    return free + best


class _Unfinished:
    """Groups that are not done, and the things at hand on the way."""

    def __init__(self, groups: Sequence[Group], sizes: Sequence[int]) -> None:
        self.groups = dict.fromkeys(groups)
        self.at_hand: set[int] = set()
        self._sizes = sizes
        self._of: dict[int, dict[Group, None]] = {}
        for group in groups:
            for thing in group:
                self._of.setdefault(thing, {})[group] = None

    def missing(self, group: Iterable[int]) -> int:
        """Bytes that must be fetched before a group can be worked on."""
        return sum(self._sizes[thing] for thing in group if thing not in self.at_hand)

    def cheapest(self) -> int | None:
        """The thing at hand, or needed beside one, that is done with after fetching least."""
        near = {other for thing in self.at_hand for group in self._of[thing] for other in group}
        return min(near, key=self._price, default=None)

    def _price(self, thing: int) -> tuple[int, bool, int]:
        beside = {other for group in self._of[thing] for other in group}
        return self.missing(beside), thing not in self.at_hand, thing

    def next_with(self, thing: int | None) -> Group | None:
        """The group that misses least, among those that need a thing."""
        if thing is None:
            return next(iter(self.groups))
        return min(self._of[thing], key=self.missing, default=None)

    def work(self, group: Group) -> None:
        """Fetch what a group needs, and do it."""
        self.at_hand |= group
        del self.groups[group]
        for each in group:
            del self._of[each][group]

    def tidy(self) -> None:
        """Put away what is not needed any more."""
        self.at_hand = {each for each in self.at_hand if self._of[each]}


def finish_cheapest(groups: Sequence[Group], sizes: Sequence[int]) -> Order:
    """From the first group on, always finish the thing that needs least beside what is at hand."""
    unfinished = _Unfinished(groups, sizes)
    order: Order = []
    while unfinished.groups:
        thing = unfinished.cheapest()
        while group := unfinished.next_with(thing):
            unfinished.work(group)
            order.append(group)
            if thing is None:
                break
        unfinished.tidy()
    return order


def tiled(groups: Sequence[Group], sizes: Sequence[int], limit: int, side: Sequence[int]) -> Order:
    """Hold as much of one side as fits, lead all others past it, and go on to the next of it."""
    places = {thing: place for place, thing in enumerate(side)}
    beside = max((_size(group - places.keys(), sizes) for group in groups), default=0)
    tiles: dict[int, int] = {}
    tile, filled = 0, 0
    for thing in side:
        if filled and filled + sizes[thing] > limit - beside:
            tile, filled = tile + 1, 0
        tiles[thing] = tile
        filled += sizes[thing]

    def key(group: Group) -> tuple[int, list[int], list[int]]:
        own = sorted(places[each] for each in group if each in places)
        rest = sorted(each for each in group if each not in places)
        number = tiles[side[own[0]]] if own else -1
        # There and back: what is at hand at the end of one tile is what the next begins with.
        return number, [-each for each in reversed(rest)] if number % 2 else rest, own

    return sorted(groups, key=key)


def _size(things: Iterable[int], sizes: Sequence[int]) -> int:
    return sum(sizes[thing] for thing in things)


def cost_of(stages: Sequence[Group], sizes: Sequence[int], limit: int) -> OrderCost:
    """What it costs to work through stages in this order."""
    found = stays(stages, sizes, limit)
    changes: Counter[int] = Counter()
    for stay in found:
        changes[stay.first] += sizes[stay.thing]
        changes[stay.last + 1] -= sizes[stay.thing]
    at_hand = peak = 0
    for stage in sorted(changes):
        at_hand += changes[stage]
        peak = max(peak, at_hand)
    return OrderCost(sum(sizes[stay.thing] for stay in found), peak)


def stays(stages: Sequence[Group], sizes: Sequence[int], limit: int) -> list[Residence]:
    """When each thing is at hand; sorted by first stage.

    A thing stays from its first use to its last. Where that exceeds the limit, the one whose next
    use is farthest goes away and comes again (Belady, IBM Systems Journal 5, 1966).
    """
    uses: dict[int, list[int]] = {}
    for stage, group in enumerate(stages):
        for thing in group:
            uses.setdefault(thing, []).append(stage)
    next_use: dict[int, int] = {}  # of what is at hand
    began: dict[int, Residence] = {}  # stays under way, up to now
    found: list[Residence] = []
    for stage, group in enumerate(stages):
        missing = [thing for thing in group if thing not in began]
        while _size(began, sizes) + _size(missing, sizes) > limit:
            idle = [thing for thing in began if thing not in group]
            if not idle:
                break  # this group alone exceeds the limit, which the caller refuses
            found.append(began.pop(max(idle, key=next_use.__getitem__)))
        for thing in group:
            began[thing] = Residence(thing, began[thing].first if thing in began else stage, stage)
            next_use[thing] = _next(uses[thing], stage)
            if next_use[thing] < 0:
                found.append(began.pop(thing))
    return sorted(found, key=lambda stay: (stay.first, stay.thing))


def _next(uses: Sequence[int], stage: int) -> int:
    """The first use after a stage; -1 if there is none."""
    place = bisect_right(uses, stage)
    return uses[place] if place < len(uses) else -1
