"""Which trial wins: the best of one metric, or the knee of the Pareto front of several."""

from collections.abc import Mapping, Sequence

Point = Sequence[float]  # one value per metric
MAXIMIZE, MINIMIZE = "maximize", "minimize"


def front(points: Mapping[int, Point], goals: Sequence[str]) -> list[int]:
    """The trials that no other beats in one metric without losing in another, in their order.

    Args:
        points: trial -> its values.
        goals: "maximize" or "minimize", one per metric.
    """
    signed = {number: _signed(point, goals) for number, point in points.items()}
    return [
        number
        for number, own in signed.items()
        if not any(_dominates(other, own) for other in signed.values())
    ]


def knee(points: Mapping[int, Point], goals: Sequence[str]) -> int:
    """The trial of a front that is farthest from the line (plane) through the front's ends.

    Each metric is scaled to 0 to 1 over the front, so that the distance grows with the sum of the
    scaled values (Das 1999, Structural Optimization 18, for two metrics). The first of equals.
    """
    signed = {number: _signed(point, goals) for number, point in points.items()}
    columns = list(zip(*signed.values(), strict=True))
    low, spread = [min(c) for c in columns], [max(c) - min(c) for c in columns]

    def height(number: int) -> float:
        own = signed[number]
        return sum(((v - a) / s for v, a, s in zip(own, low, spread, strict=True) if s), 0.0)

    return max(signed, key=lambda number: (height(number), -number))


def choose(points: Mapping[int, Point], goals: Sequence[str]) -> tuple[int, list[int]]:
    """The winner and the front; of one metric the front is the winner alone.

    Args:
        points: trial -> its values; at least one.
        goals: as for `front`.
    """
    if len(goals) == 1:
        best = max(points, key=lambda number: (_signed(points[number], goals)[0], -number))
        return best, [best]
    found = front(points, goals)
    return knee({number: points[number] for number in found}, goals), found


def _signed(point: Point, goals: Sequence[str]) -> tuple[float, ...]:
    pairs = zip(point, goals, strict=True)
    return tuple(value if goal == MAXIMIZE else -value for value, goal in pairs)


def _dominates(one: Point, other: Point) -> bool:
    pairs = list(zip(one, other, strict=True))
    return all(a >= b for a, b in pairs) and any(a > b for a, b in pairs)
