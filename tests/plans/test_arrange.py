"""The order of work: nothing exceeds the limit, little is fetched twice; against brute force."""

from itertools import permutations

from hypothesis import given
from hypothesis import strategies as st

from drift_merge.plans.arrange import arrange, cost_of, finish_cheapest, stays, tiled
from tests.strategies import quick


def group(*things):
    return frozenset(things)


def at_hand(found, stage):
    return {stay.thing for stay in found if stay.first <= stage <= stay.last}


@st.composite
def problems(draw, most=8):
    num_things = draw(st.integers(1, 6))
    sizes = draw(st.lists(st.integers(1, 5), min_size=num_things, max_size=num_things))
    some = st.frozensets(st.integers(0, num_things - 1), max_size=3)
    groups = draw(st.lists(some, min_size=1, max_size=most, unique=True))
    least = max(sum(sizes[thing] for thing in group) for group in groups)
    return groups, sizes, draw(st.integers(max(least, 1), max(least, sum(sizes))))


@given(problems())
def test_what_a_stage_needs_is_at_hand_and_the_limit_is_kept(problem):
    groups, sizes, limit = problem
    order = arrange(groups, sizes, limit, [range(0, len(sizes), 2), range(1, len(sizes), 2)])
    assert sorted(order, key=sorted) == sorted(groups, key=sorted)
    found = stays(order, sizes, limit)
    assert found == sorted(found, key=lambda stay: stay.first)
    for stage, needed in enumerate(order):
        here = at_hand(found, stage)
        assert needed <= here
        assert sum(sizes[thing] for thing in here) <= limit


@given(problems())
def test_stays_of_one_thing_do_not_overlap_and_begin_and_end_with_a_use(problem):
    groups, sizes, limit = problem
    last = {}
    for stay in stays(groups, sizes, limit):
        assert stay.first > last.get(stay.thing, -1)
        assert stay.thing in groups[stay.first] & groups[stay.last]
        last[stay.thing] = stay.last


@given(problems())
def test_nothing_is_fetched_twice_where_everything_fits(problem):
    groups, sizes, _ = problem
    used = {thing for group in groups for thing in group}
    cost = cost_of(arrange(groups, sizes, sum(sizes)), sizes, sum(sizes))
    assert cost.fetched == sum(sizes[thing] for thing in used)


@quick
@given(problems(most=5))
def test_no_order_is_much_cheaper_than_the_one_that_is_taken(problem):
    groups, sizes, limit = problem
    taken = cost_of(arrange(groups, sizes, limit), sizes, limit).fetched
    best = min(cost_of(order, sizes, limit).fetched for order in permutations(groups))
    assert best <= taken <= 1.5 * best


def staircase(num_left, num_right):
    """Layers in order over two models with differently many shards: all pairs that meet."""
    marks = {i / num_left for i in range(num_left)} | {i / num_right for i in range(num_right)}
    pairs = [(int(m * num_left + 1e-9), int(m * num_right + 1e-9)) for m in sorted(marks)]
    return [group(left, num_left + right) for left, right in pairs]


def test_models_in_the_order_of_their_layers_need_two_shards_at_a_time():
    groups = staircase(30, 19)
    sizes = [5] * 49
    order = arrange(groups, sizes, limit=10)
    assert cost_of(order, sizes, 10).fetched == 5 * 49
    assert max(len(at_hand(stays(order, sizes, 10), n)) for n in range(len(order))) == 2


def test_models_that_meet_in_every_pair_of_shards_hold_the_smaller_one():
    few, many = 4, 12
    groups = [group(a, few + b) for b in range(many) for a in range(few)]
    sizes = [1] * (few + many)
    for natural in (groups, sorted(groups, key=min)):
        order = arrange(natural, sizes, few + 1)
        cost = cost_of(order, sizes, few + 1)
        assert (cost.fetched, cost.peak) == (few + many, few + 1)


def test_below_that_tiles_cost_no_more_than_their_number_of_passes():
    few, many, limit = 6, 12, 4
    groups = [group(a, few + b) for b in range(many) for a in range(few)]
    sizes = [1] * (few + many)
    order = arrange(groups, sizes, limit, [range(few), range(few, few + many)])
    # Two tiles of three shards, with the other twelve led past each.
    assert cost_of(order, sizes, limit).fetched <= few + 2 * many


def test_work_that_needs_nothing_comes_first_and_the_rest_in_its_natural_order_where_that_is_best():
    groups = [group(0), group(), group(0, 1), group(1)]
    assert arrange(groups, [1, 1], 4) == [group(), group(0), group(0, 1), group(1)]


def test_an_order_depends_on_numbers_alone():
    groups = [group(a, 5 + b) for b in (3, 1, 2) for a in (4, 0, 2)]
    assert finish_cheapest(groups, [1] * 10) == finish_cheapest(list(groups), [1] * 10)
    assert tiled(groups, [1] * 10, 3, range(5)) == tiled(groups[::-1], [1] * 10, 3, range(5))
