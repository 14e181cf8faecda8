"""Which tokens of an encoded conversation an answer is.

The processor puts many tokens in the place of each image. Elsewhere its tokens are those of the
text alone, so that an answer is found by what stands before it.
"""

from collections.abc import Callable, Sequence
from typing import Any

from drift_merge.errors import CheckpointError

Tokens = Sequence[int]
Range = tuple[int, int]


def token_ranges(
    text: str, spans: Sequence[Range], tokens: Tokens, encode: Callable[[str], Tokens]
) -> list[Range]:
    """Ranges of the tokens of a text, for ranges of its characters.

    A token that joins what stands before an answer with its beginning is learned.

    Args:
        text: the whole.
        spans: of characters.
        tokens: of the whole text.
        encode: gives the tokens of a text.
    """

    def tokens_before(end: int) -> int:
        return len(tokens) if end == len(text) else shared(tokens, encode(text[:end]))

    return [(tokens_before(begin), tokens_before(end)) for begin, end in spans]


def shared(one: Sequence[Any], other: Sequence[Any]) -> int:
    """The length of what two sequences begin with."""
    length = min(len(one), len(other))
    return next((n for n in range(length) if one[n] != other[n]), length)


def places_in(expanded: Tokens, tokens: Tokens, ranges: Sequence[Range], where: str) -> list[Range]:
    """The same ranges within what the processor has made.

    Args:
        expanded: tokens with those of the images.
        tokens: of the text with one place for each image.
        ranges: within `tokens`, in order.
        where: file and line.

    Raises:
        CheckpointError: they are not there.
    """
    shift, last, total = 0, 0, len(expanded) - len(tokens)
    found = []
    for begin, end in ranges:
        shift = _shift(expanded, tokens, (last, begin, end), (shift, total), where)
        found.append((begin + shift, end + shift))
        last = end
    return found


def _shift(
    expanded: Tokens, tokens: Tokens, at: tuple[int, int, int], shifts: Range, where: str
) -> int:
    """How far the images before an answer have moved it: with as much before it as is equal."""
    last, begin, end = at
    least, most = shifts

    def found(context: int) -> int | None:
        words = list(tokens[begin - context : end])
        for shift in range(least, most + 1):
            first = begin - context + shift
            if expanded[first] == words[0] and list(expanded[first : end + shift]) == words:
                return shift
        return None

    if begin < end and (best := found(0)) is not None:
        low, high = 0, begin - last  # `low` is found; find the most that is
        while low < high:
            middle = (low + high + 1) // 2
            shift = found(middle)
            low, high = (middle, high) if shift is not None else (low, middle - 1)
            best = shift if shift is not None else best
        return best
    raise CheckpointError(
        f"{where}: the tokens of the answer are not to be found in what the processor has made.",
        remedy="The processor changes the text in a way that is not known here. Use DriftCallback"
        " in your own trainer (drift-prior guide trainers).",
    )
