"""The winner of one metric, the front and the knee of several."""

from hypothesis import given, settings
from hypothesis import strategies as st

from drift_merge.searches.selection import choose, front, knee

UP = ("maximize", "maximize")
values = st.integers(0, 6).map(float)


def test_the_best_of_one_metric_is_the_first_of_equals():
    points = {3: [0.5], 4: [0.7], 9: [0.7]}
    assert choose(points, ["maximize"]) == (4, [4])
    assert choose(points, ["minimize"]) == (3, [3])


@settings(max_examples=30)
@given(st.dictionaries(st.integers(0, 99), st.tuples(values, values), min_size=1, max_size=12))
def test_the_front_is_what_no_other_beats(points):
    expected = [
        n
        for n, (a, b) in points.items()
        if not any(c >= a and d >= b and (c, d) != (a, b) for c, d in points.values())
    ]
    assert front(points, UP) == expected
    assert choose(points, UP)[0] in expected
    turned = {n: (a, -b) for n, (a, b) in points.items()}
    assert front(turned, ("maximize", "minimize")) == expected


def test_the_knee_is_farthest_from_the_line_through_the_ends():
    points = {0: (0.0, 10.0), 1: (0.5, 6.0), 2: (0.9, 8.0), 3: (1.0, 0.0)}
    assert knee(points, UP) == 2
    assert knee({7: (1.0, 1.0)}, UP) == 7
    assert knee({0: (0.0, 1.0), 1: (1.0, 0.0)}, UP) == 0
