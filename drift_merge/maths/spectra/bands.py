"""Bands of singular directions, as a user writes them; without torch, for `--help` and checks."""

import itertools
from collections.abc import Sequence

Band = tuple[int, int | None, float]  # first direction, one past the last or None: all, factor


def parse_bands(text: str) -> tuple[Band, ...]:
    """Read `0:16=0.1,16:64=0.05,64:=0`; directions that no band names get nothing.

    Raises:
        ValueError: saying what cannot be read.
    """
    bands: list[Band] = []
    for item in text.split(","):
        where, equals, factor = item.partition("=")
        first, colon, last = where.partition(":")
        try:
            begin, end = int(first or 0), int(last) if last.strip() else None
            number = float(factor)
        except ValueError:
            begin, end, number = -1, None, 0.0
        if not equals or not colon or begin < 0 or (end is not None and end <= begin):
            raise ValueError(f"{item.strip()!r} is no band FIRST:END=FACTOR")
        if number - number != 0.0:
            raise ValueError(f"{item.strip()!r} has no finite factor")
        bands.append((begin, end, number))
    _refuse_overlaps(sorted(bands, key=lambda band: band[0]))
    return tuple(bands)


def _refuse_overlaps(bands: Sequence[Band]) -> None:
    for (_, end, _), (begin, _, _) in itertools.pairwise(bands):
        if end is None or begin < end:
            raise ValueError(f"direction {begin} is in two bands")
