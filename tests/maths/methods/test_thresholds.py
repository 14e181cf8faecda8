"""Exact sets of the largest entries, found without sorting: counts, ties, misses, samples."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from drift_merge.maths.methods.trimming import kept_count, kept_ranks
from drift_merge.maths.order import thresholds
from drift_merge.maths.order.collected import Collected, joined
from drift_merge.maths.order.cuts import Cut
from drift_merge.maths.order.thresholds import kth_largest, largest
from tests import reference_methods as reference
from tests.maths.methods.driver import merge, settings_for
from tests.strategies import few

numels = [*range(1, 101), 127, 1000, 4097]


def walker(values, chunk, sample=None):
    """Walks over values; `sample` replaces what a sample holds."""

    def walk(is_sample):
        source = values if sample is None or not is_sample else sample
        for begin in range(0, len(source), chunk):
            yield begin, [source[begin : begin + chunk].clone()]

    return walk


def members(cut, values, chunk):
    """The mask of a set, asked for chunk by chunk."""
    parts = range(0, len(values), chunk)
    return torch.cat([cut.mask(values[i : i + chunk], i) for i in parts])


def expected(values, count):
    order = torch.sort(values, descending=True, stable=True).indices[:count]
    return torch.zeros_like(values).index_fill_(0, order, 1.0)


def check(values, count, chunk=1000, sample=None):
    [[cut]] = largest(walker(values, chunk, sample), [[count]], len(values))
    assert torch.equal(members(cut, values, chunk), expected(values, count))


KINDS = {
    "normal": lambda g, n: torch.randn(n, generator=g).abs(),
    "few values": lambda g, n: torch.randint(0, 4, (n,), generator=g).float() * 0.25,
    "mostly zero": lambda g, n: torch.randn(n, generator=g).clamp_(min=1.5).sub_(1.5),
    "all equal": lambda g, n: torch.full((n,), 0.5),
    "all zero": lambda g, n: torch.zeros(n),
    "ascending": lambda g, n: torch.arange(n).float(),
    "subnormal": lambda g, n: torch.randint(0, 9, (n,), generator=g) * 2.0**-149,
    "one giant": lambda g, n: (
        torch.randn(n, generator=g).abs().index_fill_(0, torch.tensor([n // 2]), 3e38)
    ),
    "rounded": lambda g, n: (torch.randn(n, generator=g) * 0.01).bfloat16().float().abs(),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_set_is_that_of_a_stable_sort_at_every_density(kind, dtype, monkeypatch):
    monkeypatch.setattr(thresholds, "_SMALL", 50)  # brackets, not sorting
    monkeypatch.setattr(thresholds, "_SAMPLE", (64, 256))
    generator = torch.Generator().manual_seed(0)
    values = KINDS[kind](generator, 3000).to(dtype)
    for count in (0, 1, 2, 29, 300, 600, 1500, 2700, 2999, 3000):
        check(values, count, chunk=700)


def test_large_streams_find_the_same_set_through_brackets():
    generator = torch.Generator().manual_seed(0)
    for kind in ("normal", "few values", "rounded", "ascending"):
        values = KINDS[kind](generator, 300_000)
        for count in (60_000, 150_000):
            check(values, count, chunk=2**16)


@given(st.integers(0, 2**31), st.integers(51, 2000), st.floats(0.0, 1.0), st.integers(3, 999))
@few
def test_a_misleading_sample_costs_walks_and_changes_nothing(seed, numel, density, chunk):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(numel, generator=generator).abs()
    small, thresholds._SMALL = thresholds._SMALL, 50
    try:
        for sample in (values * 0.0, values + 100.0, values * 1e-3, torch.full((numel,), 0.7)):
            check(values, round(density * numel), chunk, sample)
    finally:
        thresholds._SMALL = small


def test_a_good_sample_takes_one_walk_and_a_bad_one_few():
    values = torch.randn(300_000).abs()
    walks = []

    def counted(sample):
        walk = walker(values, 2**16)

        def walking(is_sample):
            walks.append(is_sample)
            return walk(False) if not is_sample or sample is None else iter([(0, [sample])])

        return walking

    largest(counted(None), [[60_000]], len(values))
    assert walks == [True, False]
    walks.clear()
    largest(counted(torch.full((300_000,), 0.001)), [[60_000]], len(values))
    assert len(walks) <= 5


@given(st.lists(st.sampled_from([0.0, 0.5, 0.5, 1.0, 2.0]), min_size=1, max_size=60), st.data())
@few
def test_the_kth_largest_and_its_place_among_equals(numbers, data):
    rank = data.draw(st.integers(1, len(numbers)))
    cut = data.draw(st.integers(0, len(numbers)))
    value, place = kth_largest([torch.tensor(numbers[:cut]), torch.tensor(numbers[cut:])], rank)
    ordered = sorted(numbers, reverse=True)
    assert value == ordered[rank - 1]
    assert place == rank - ordered.index(value)


def test_the_kth_largest_of_many_parts_is_found_without_joining_them():
    values = torch.randn(200_000, generator=torch.Generator().manual_seed(1)).abs()
    ordered = values.sort(descending=True).values
    for rank in (1, 777, 100_000, 200_000):
        assert kth_largest(list(values.split(5_000)), rank) == (float(ordered[rank - 1]), 1)


def test_collected_values_lie_in_few_blocks_in_the_order_they_came():
    bag, parts = Collected(), list(torch.arange(700_000.0).split(20_011))
    seen = [bag.add(part) for part in parts]
    assert all(torch.equal(one, other) for one, other in zip(seen, parts, strict=True))
    assert len(bag) == 700_000
    assert len(bag.parts()) == 3
    assert torch.equal(joined(bag.parts()), torch.arange(700_000.0))
    large = torch.zeros(2**18 + 1)
    assert bag.add(large).numel() == large.numel()


def test_several_streams_and_counts_share_their_walks():
    streams = [torch.randn(900).abs(), torch.randint(0, 3, (900,)).float()]

    def walk(sample):
        for begin in range(0, 900, 250):
            yield begin, [s[begin : begin + 250].clone() for s in streams]

    cuts = largest(walk, [[100, 10], [450]], 900)
    assert [len(found) for found in cuts] == [2, 1]
    for stream, found, counts in zip(streams, cuts, ([100, 10], [450]), strict=True):
        for cut, count in zip(found, counts, strict=True):
            assert torch.equal(members(cut, stream, 250), expected(stream, count))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_walks_end_for_values_that_are_not_finite(bad):
    values = torch.randn(500).abs()
    values[::3] = bad
    for count in (1, 100, 400, 499):
        [[cut]] = largest(walker(values, 99), [[count]], 500)
        assert isinstance(cut, Cut)


@pytest.mark.parametrize("density", [0.001, 0.1, 0.2, 0.25, 0.5, 0.9, 1.0])
def test_ties_keeps_exactly_the_promised_count_at_every_size(density):
    for numel in numels:
        generator = torch.Generator().manual_seed(numel)
        tau = torch.randn(numel, generator=generator).bfloat16().float()
        tau[tau == 0.0] = 1.0
        zero = torch.zeros(numel)
        # The mllm is the base, so that what is kept of the reasoner is what is not 0.
        found = merge("ties", zero, [tau], zero, density=density)
        kept = set(found.nonzero().flatten().tolist())
        assert len(kept) == max(1, round(density * numel))
        assert kept == reference.largest(tau.tolist(), len(kept))


@pytest.mark.parametrize("variant", ["paper", "mergekit"])
@pytest.mark.parametrize(("density", "gamma"), [(0.9, 0.01), (0.14, 0.01), (0.5, 0.3), (1.0, 0.1)])
def test_breadcrumbs_keep_exactly_the_promised_count_at_every_size(variant, density, gamma):
    for numel in numels:
        generator = torch.Generator().manual_seed(numel)
        tau = torch.randn(numel, generator=generator)
        zero = torch.zeros(numel)
        options = {"density": density, "gamma": gamma, "variant": variant, "weights": [1.0]}
        found = merge("breadcrumbs", zero, [tau], zero, **options)
        if variant == "paper":
            count = min(
                max(1, round(density * numel)), numel - min(round(gamma * numel), numel - 1)
            )
        else:
            count = int(density * numel)
        assert int(found.count_nonzero()) == count


def test_sce_keeps_exactly_the_promised_count_at_every_size():
    for numel in numels:
        tau = torch.randn(numel, generator=torch.Generator().manual_seed(numel))
        found = merge("sce", torch.zeros(numel), [tau], torch.zeros(numel), density=0.1)
        assert int(found.count_nonzero()) == max(1, round(0.1 * numel))


def test_an_empty_tensor_keeps_nothing_and_others_at_least_one():
    for variant, least in (("paper", 1), ("mergekit", 1), ("peft", 0)):
        weights = {"weights": [1.0]}
        density = {"density": 0.001}
        settings = settings_for("ties", (4,), variant=variant, **weights, **density)
        assert kept_count(0, settings) == 0
        assert kept_count(4, settings) == least
    settings = settings_for("breadcrumbs", (4,), gamma=0.9, density=0.9)
    assert kept_ranks(1, settings) == (0, 1)
    assert kept_ranks(0, settings)[1] == 0
