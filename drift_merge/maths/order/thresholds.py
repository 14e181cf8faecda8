"""Exact order statistics of a stream, without sorting it and without holding it.

The k largest of n magnitudes are found by a bracket around the k-th: a small sample says where
it should be, one walk counts the entries above the bracket and collects those inside (a few per
cent), and the k-th is among the collected. If it is not, the counts say on which side, and the
next walk looks there. So the sample decides how long it takes, never what is found.

The order is by magnitude, largest first, and among equal magnitudes by position, lowest first.

Shapes: one-dimensional magnitudes, not negative.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from math import inf, isfinite, sqrt

import torch
from torch import Tensor

from drift_merge.maths.order.collected import Collected, joined
from drift_merge.maths.order.cuts import Cut, next_number

# (position of the first entry, one chunk per stream). True: a sample will do, as of Read.
Walk = Callable[[bool], Iterator[tuple[int, Sequence[Tensor]]]]

_SMALL = 2**15  # up to so many entries are simply sorted
_SAMPLE = (2**12, 2**17)  # least and most entries in a sample; between them 1 in 128
_MARGIN = 4.0  # standard errors of the sample on each side; more after a miss
_FOLD = 8  # rows in which a chunk is folded to find collected entries; see `_inside`
_PIECE = 2**17  # entries at a time when the collected entries are searched in turn


def largest(
    walk: Walk, counts: Sequence[Sequence[int]], numel: int, *, shortcut: bool = True
) -> list[list[Cut]]:
    """For each stream, the sets of its k largest entries, for each k of `counts`.

    Args:
        walk: calls of it walk over all streams; magnitudes are scratch.
        counts: per stream the wanted numbers of entries; clipped to [0, numel].
        numel: entries of a stream.
        shortcut: False has the value of the smallest entry found too, where all are wanted.

    Returns:
        Per stream one Cut per count. Magnitudes should be finite; with others among them the
        walks end as well, but the sets may be smaller.
    """
    searches = [[_Search(k, numel, shortcut) for k in wanted] for wanted in counts]
    pending = _open(searches)
    if numel > _SMALL and pending:
        _take_samples(walk, searches, numel)
    while pending:
        for searching in pending:
            searching.aim()
        _look_at_all(walk, searches)
        for searching in pending:
            searching.settle()
        pending = _open(searches)
    return [[s.cut for s in wanted if s.cut is not None] for wanted in searches]


def _open(searches: list[list["_Search"]]) -> list["_Search"]:
    return [s for wanted in searches for s in wanted if s.cut is None]


def _look_at_all(walk: Walk, searches: list[list["_Search"]]) -> None:
    """One walk over all streams, for every search that still goes on."""
    scratch = _Scratch()
    for begin, streams in walk(False):
        for magnitudes, wanted in zip(streams, searches, strict=True):
            for searching in wanted:
                if searching.cut is None:
                    searching.look(begin, magnitudes, scratch)


def _take_samples(walk: Walk, searches: list[list["_Search"]], numel: int) -> None:
    """Give every search a sorted sample of its stream, spread evenly over it."""
    size = min(max(numel // 128, _SAMPLE[0]), _SAMPLE[1])
    parts: list[list[Tensor]] = [[] for _ in searches]
    reached = 0
    for begin, streams in walk(True):
        length = streams[0].numel()
        share = max(1, size * (begin + length - reached) // numel)
        reached = begin + length
        stride = max(1, length // share) | 1  # odd: never one column of a matrix again and again
        for taken, magnitudes in zip(parts, streams, strict=True):
            taken.append(magnitudes[::stride].clone())
    for taken, wanted in zip(parts, searches, strict=True):
        ordered = torch.cat(taken).nan_to_num_().sort().values
        for searching in wanted:
            searching.sample = ordered


class _Scratch:
    """Two buffers that a walk uses for every chunk; new ones would be cleared by the system."""

    def __init__(self) -> None:
        self._memory: list[Tensor] = []

    def pair(self, like: Tensor) -> list[Tensor]:
        if not self._memory or self._memory[0].numel() < like.numel():
            self._memory = [torch.empty_like(like) for _ in range(2)]
        return [memory[: like.numel()] for memory in self._memory]


@dataclass(slots=True)
class _BracketCount:
    """What one chunk held inside the bracket."""

    begin: int
    values: Tensor | None  # among the collected, unordered; None for a bracket of one value
    num_inside: int


@dataclass(slots=True)
class _Search:
    """The search for one set. Always: num_from_high < count <= num_from_low."""

    count: int
    numel: int
    shortcut: bool
    cut: Cut | None = None
    sample: Tensor | None = None  # sorted
    low: float = 0.0  # the k-th largest is at least this
    high: float = inf  # and below this
    num_from_low: int = 0  # entries >= low
    num_from_high: int = 0  # entries >= high
    misses: int = 0
    bracket: tuple[float, float] = (0.0, inf)  # of this walk: first value inside, first above
    is_single: bool = False  # the bracket holds one value only
    above: int = 0  # entries of this walk at or above the bracket
    looks: list[_BracketCount] = field(default_factory=list)
    collected: Collected = field(default_factory=Collected)

    def __post_init__(self) -> None:
        self.num_from_low = self.numel
        if self.count <= 0:
            self.cut = Cut(inf)
        elif self.count >= self.numel and self.shortcut:
            self.cut = Cut(-1.0)

    def aim(self) -> None:
        """Choose the bracket of the next walk."""
        self.above, self.looks, self.collected = 0, [], Collected()
        self.bracket = (self.low, self.high)
        if self.sample is None:
            return
        ends = torch.tensor([self.low, self.high], dtype=self.sample.dtype)
        first, last = torch.searchsorted(self.sample, ends.to(self.sample.device)).tolist()
        if last > first:
            self.bracket = self._around(self.sample[first:last])

    def _around(self, known: Tensor) -> tuple[float, float]:
        """The bracket around the wanted rank in a sorted sample of what is still possible."""
        size = len(known)
        share = (self.num_from_low - self.count) / (self.num_from_low - self.num_from_high)
        error = sqrt(share * (1.0 - share) * size)
        margin = int(_MARGIN * 4**self.misses * (error + 1.0))
        center = min(int(share * size), size - 1)
        left, right = max(center - margin, 0), min(center + margin, size - 1)
        smallest, largest = float(known[left]), float(known[right])
        if smallest == largest:
            return smallest, next_number(smallest, known.dtype, up=True)
        low = smallest if left > 0 else self.low
        high = next_number(largest, known.dtype, up=True) if right < size - 1 else self.high
        # A value shared by many is kept out of the collection, so that it stays small.
        if _num_equal(known, smallest) > 2 * margin:
            low = next_number(smallest, known.dtype, up=True)
        if _num_equal(known, largest) > 2 * margin:
            high = largest
        if low < high:
            return low, high
        middle = float(known[center])
        return middle, next_number(middle, known.dtype, up=True)

    def look(self, begin: int, magnitudes: Tensor, scratch: "_Scratch") -> None:
        """Count and collect one chunk."""
        low, high = self.bracket
        if not self.looks:
            self.is_single = high == next_number(low, magnitudes.dtype, up=True)
        high_mask, mask = scratch.pair(magnitudes)
        torch.ge(magnitudes, high, out=high_mask)
        self.above += int(high_mask.sum())
        torch.ge(magnitudes, low, out=mask).sub_(high_mask)
        if self.is_single:
            self.looks.append(_BracketCount(begin, None, int(mask.sum())))
            return
        values = self.collected.add(_inside(magnitudes, mask))
        self.looks.append(_BracketCount(begin, values, len(values)))

    def settle(self) -> None:
        """Find the set in what was collected, or narrow the search."""
        low, high = self.bracket
        inside = sum(look.num_inside for look in self.looks)
        if self.count <= self.above:
            self.low, self.num_from_low = high, self.above
        elif self.count > self.above + inside:
            self.high, self.num_from_high = low, self.above + inside
        else:
            self.cut = self._found(self.count - self.above)
            self.looks, self.collected = [], Collected()
            return
        self.misses += 1
        if not self.low < self.high:  # entries that compare with nothing, or infinity
            self.cut = Cut(self.low if isfinite(self.low) else inf)

    def _found(self, rank: int) -> Cut:
        """The set whose last entry is the `rank`-th largest inside the bracket."""
        value = self.bracket[0]
        ties = [look.num_inside for look in self.looks]
        if not self.is_single:
            # A bracket that kept most of the stream would keep most of it again.
            search = kth_largest if len(self.collected) <= self.numel // 2 else _kth_by_selection
            value, rank = search(self.collected.parts(), rank)
            found = [look.values for look in self.looks if look.values is not None]
            ties = [int((values == value).sum()) for values in found]
        for look, num_ties in zip(self.looks, ties, strict=True):
            if rank <= num_ties:
                return Cut(value, ties_from=look.begin, ties_left=rank)
            rank -= num_ties
        raise AssertionError("the rank lies inside the bracket")


def kth_largest(parts: list[Tensor], rank: int) -> tuple[float, int]:
    """The `rank`-th largest of values in memory (unordered), and which of its equals it is.

    Args:
        parts: together n values, not negative.
        rank: in [1, n].

    Returns:
        The value, and the rank among the entries equal to it, counted from 1.
    """
    numel = sum(part.numel() for part in parts)
    if numel <= _SMALL:
        return _kth_by_selection(parts, rank)

    def walk(sample: bool) -> Iterator[tuple[int, Sequence[Tensor]]]:
        position = 0
        for part in parts:
            for begin in range(0, part.numel(), _PIECE):
                piece = part[begin : begin + _PIECE]
                yield position, [piece]
                position += piece.numel()

    [[cut]] = largest(walk, [[rank]], numel, shortcut=False)
    return cut.value, rank - _num_above(parts, cut.value)


def _kth_by_selection(parts: list[Tensor], rank: int) -> tuple[float, int]:
    """`kth_largest` by torch alone: 40 ns an entry."""
    values = joined(parts)
    value = float(values.kthvalue(len(values) - rank + 1).values)
    return value, rank - _num_above(parts, value)


def _num_above(parts: list[Tensor], value: float) -> int:
    return sum(int((part > value).sum()) for part in parts)


def _inside(magnitudes: Tensor, mask: Tensor) -> Tensor:
    """The entries whose float mask is 1, in any order.

    Few are: boolean indexing costs 2 ns an entry of the chunk. Folding the mask into rows finds
    the columns that hold any at a tenth of that, and only those are indexed.
    """
    even = magnitudes.numel() // _FOLD * _FOLD
    folded, folded_mask = magnitudes[:even].view(_FOLD, -1), mask[:even].view(_FOLD, -1)
    columns = folded_mask.amax(0).bool().nonzero().view(-1)
    chosen = folded_mask.index_select(1, columns).bool()
    found = folded.index_select(1, columns)[chosen]
    if even == magnitudes.numel():
        return found
    return torch.cat([found, magnitudes[even:][mask[even:].bool()]])


def _num_equal(ordered: Tensor, value: float) -> int:
    """How often a value occurs in a sorted tensor."""
    wanted = torch.tensor(value, dtype=ordered.dtype, device=ordered.device)
    last = torch.searchsorted(ordered, wanted, right=True)
    return int(last - torch.searchsorted(ordered, wanted))
