"""Paired intervals against references that are written from the papers, by brute force."""

import itertools
import random
from fractions import Fraction
from math import comb, sqrt
from statistics import fmean, stdev

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from drift_merge.evaluation.intervals import agresti_min, bootstrap, compare, mcnemar


@pytest.mark.parametrize("wins", range(9))
@pytest.mark.parametrize("losses", range(9))
def test_mcnemar_is_the_share_of_coin_tosses_that_are_as_uneven(wins, losses):
    tosses = itertools.product((0, 1), repeat=wins + losses)
    distance = abs(wins - losses)
    as_uneven = sum(abs(2 * sum(toss) - wins - losses) >= distance for toss in tosses)
    assert mcnemar(wins, losses) == float(Fraction(as_uneven, 2 ** (wins + losses)))


def test_mcnemar_of_a_thousand_items_is_exact_too():
    tail = sum(Fraction(comb(1000, k), 2**1000) for k in range(451))
    assert mcnemar(450, 550) == pytest.approx(float(2 * tail), rel=1e-12)


@settings(max_examples=40)
@given(st.integers(0, 50), st.integers(0, 50), st.integers(0, 200))
def test_the_interval_holds_the_difference_and_turns_round_with_the_models(wins, losses, ties):
    n = wins + losses + ties
    if not n:
        return
    low, high = agresti_min(wins, losses, n)
    assert -1 <= low < high <= 1
    middle = (wins - losses) / (n + 2)
    assert (low + high) / 2 == pytest.approx(middle, abs=1e-12) or low == -1 or high == 1
    assert agresti_min(losses, wins, n) == pytest.approx((-high, -low))


def test_nineteen_of_twenty_intervals_hold_the_true_difference():
    rng = random.Random(0)
    p_win, p_loss, n, hits = 0.12, 0.05, 120, 0
    for _ in range(800):
        drawn = [rng.random() for _ in range(n)]
        wins = sum(x < p_win for x in drawn)
        losses = sum(p_win <= x < p_win + p_loss for x in drawn)
        low, high = agresti_min(wins, losses, n)
        hits += low <= p_win - p_loss <= high
    assert 0.93 < hits / 800 < 0.98


def test_the_bootstrap_agrees_with_the_normal_interval_of_many_items():
    rng = random.Random(1)
    differences = [rng.gauss(0.1, 1.0) for _ in range(200)]
    low, high = bootstrap(differences)
    reach = 1.96 * stdev(differences) / sqrt(200)
    assert low == pytest.approx(fmean(differences) - reach, abs=0.1 * reach)
    assert high == pytest.approx(fmean(differences) + reach, abs=0.1 * reach)
    assert bootstrap(differences) == (low, high)


def test_right_and_wrong_answers_are_compared_by_pairs():
    one = {str(i): float(i < 60) for i in range(100)}
    other = {str(i): float(10 <= i < 55) for i in range(100)} | {"alone": 1.0}
    found = compare(one, other)
    assert (found.test, found.wins, found.losses) == ("mcnemar", 15, 0)
    assert (found.num_items, found.num_unpaired) == (100, 1)
    assert found.difference == 0.15
    assert found.p == 2 / 2**15
    assert not found.is_noise


def test_equal_models_are_within_noise_and_the_interval_is_not_a_point():
    same = {str(i): float(i % 2) for i in range(50)}
    found = compare(same, same)
    assert (found.difference, found.p, found.is_noise) == (0.0, 1.0, True)
    assert found.low < 0 < found.high


def test_graded_scores_get_a_bootstrap_and_models_without_shared_items_nothing():
    found = compare({"a": 0.5, "b": 0.7}, {"a": 0.1, "b": 0.2})
    assert (found.test, found.p) == ("bootstrap", None)
    assert found.low <= found.difference <= found.high
    assert not found.is_noise
    assert compare({"a": 1.0}, {"b": 1.0}) is None
