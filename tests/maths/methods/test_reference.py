"""Every method in its `paper` variant against the naive float64 reference."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from drift_merge.maths.masks import keep_mask, mixed_key, uniform
from drift_merge.maths.methods import METHODS
from tests import reference_methods as reference
from tests.maths.methods.driver import merge, settings_for
from tests.strategies import few

KEY = 99


def draws(seed, shape, count=3, dtype=torch.float32):
    """Models around a common base: [base, mllm, reasoner, ...]."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(shape, generator=generator, dtype=dtype)
    return [
        base,
        *(base + 0.3 * torch.randn(shape, generator=generator, dtype=dtype) for _ in range(count)),
    ]


def lists(*tensors):
    return [t.double().flatten().tolist() for t in tensors]


def close(found, exact, inputs, *, factor=16):
    """Within a few roundings of the largest number that takes part."""
    largest = max(float(t.abs().max()) for t in inputs)
    bound = factor * torch.finfo(found.dtype).eps * largest
    return torch.allclose(
        found.double().flatten(),
        torch.tensor(exact, dtype=torch.float64).flatten(),
        rtol=0.0,
        atol=bound,
    )


sizes = st.sampled_from([(1,), (7,), (3, 5), (4, 8), (2, 3, 5), (101,)])
seeds = st.integers(0, 2**31)
kinds = st.sampled_from([torch.float32, torch.float64])


@given(seeds, sizes, st.integers(1, 3), kinds)
@few
def test_linear_combinations_are_the_papers(seed, shape, count, dtype):
    base, mllm, *reasoners = models = draws(seed, shape, 1 + count, dtype)
    b, m, *rs = lists(*models)
    weights = [0.5, -0.25, 0.75][:count]
    taus = reference.deltas(rs, b)
    taken = {"weights": weights}
    exact = reference.weighted([m, *rs], [1 - sum(weights), *weights])
    assert close(merge("linear", mllm, reasoners, **taken), exact, models)
    assert close(merge("layer-swap", mllm, reasoners, **taken), exact, models)
    exact = reference.add(m, reference.weighted(taus, weights), 0.7)
    assert close(merge("chat-vector", mllm, reasoners, base, scale=0.7, **taken), exact, models)
    assert close(merge("inject", mllm, reasoners, base, scale=0.7, **taken), exact, models)
    all_taus = reference.deltas([m, *rs], b)
    exact = reference.add(b, reference.weighted(all_taus, [2.0, *weights]), 0.7)
    found = merge("task-arithmetic", mllm, reasoners, base, scale=0.7, mllm_weight=2.0, **taken)
    assert close(found, exact, models)


@given(seeds, sizes, st.floats(0.0, 1.0))
@few
def test_nearswap_moves_by_at_most_t(seed, shape, t):
    _, mllm, reasoner = models = draws(seed, shape, 2)
    m, r = lists(mllm, reasoner)
    exact = [x + min(1.0, t / abs(y - x)) * (y - x) for x, y in zip(m, r, strict=True)]
    assert close(merge("nearswap", mllm, [reasoner], t=t), exact, models)


@given(seeds, sizes, st.integers(1, 3), st.floats(0.01, 1.0), kinds)
@few
def test_ties_is_the_papers_algorithm_per_tensor(seed, shape, count, density, dtype):
    base, *models = every = draws(seed, shape, 1 + count, dtype)
    b, *ms = lists(*every)
    exact = reference.ties(ms, b, density, 0.8)
    found = merge("ties", models[0], models[1:], base, density=density, scale=0.8)
    assert close(found, exact, every)


def test_weighted_ties_is_a_weighted_mean_of_what_agrees():
    base, *models = every = draws(3, (40,), 3)
    b, *ms = lists(*every)
    taus = [reference.keep(t, reference.largest(t, 20)) for t in reference.deltas(ms, b)]
    exact = reference.add(b, reference.elect_and_average(taus, [1.0, 0.3, 0.6]))
    found = merge("ties", models[0], models[1:], base, density=0.5, weights=[0.3, 0.6])
    assert close(found, exact, every)


@given(seeds, sizes, st.floats(0.01, 1.0), st.floats(0.0, 0.5))
@few
def test_breadcrumbs_drop_both_ends(seed, shape, density, gamma):
    base, *models = every = draws(seed, shape, 3)
    b, *ms = lists(*every)
    taus = reference.breadcrumbs_taus(ms, b, density, gamma)
    options = {"density": density, "gamma": gamma}
    exact = reference.add(b, reference.weighted(taus, [1.0, 0.5, 0.5]))
    found = merge("breadcrumbs", models[0], models[1:], base, weights=[0.5, 0.5], **options)
    assert close(found, exact, every)
    exact = reference.add(b, reference.elect_and_average(taus, [1.0] * 3))
    assert close(merge("breadcrumbs-ties", models[0], models[1:], base, **options), exact, every)


@given(seeds, sizes, st.floats(0.05, 1.0))
@few
def test_dare_with_its_own_masks_is_the_papers_formula(seed, shape, density):
    base, *models = every = draws(seed, shape, 3)
    b, *ms = lists(*every)
    masks = lists(*(keep_mask(mixed_key(KEY, i), 0, density, base.flatten()) for i in range(3)))
    taus = reference.dare_taus(ms, b, masks, density)
    exact = reference.add(b, reference.weighted(taus, [1.0, 0.5, 0.5]), 0.5)
    options = {"density": density, "scale": 0.5, "key": KEY}
    found = merge("dare-linear", models[0], models[1:], base, weights=[0.5, 0.5], **options)
    assert close(found, exact, every, factor=16 / density)
    exact = reference.add(b, reference.elect_and_average(taus, [1.0] * 3), 0.5)
    found = merge("dare-ties", models[0], models[1:], base, **options)
    assert close(found, exact, every, factor=16 / density)


@given(seeds, st.sampled_from([(1,), (9,), (3, 5), (4, 1), (2, 3, 4)]))
@few
def test_della_with_its_own_chances_is_the_papers_formula(seed, shape):
    base, *models = every = draws(seed, shape, 3, torch.float64)
    b, *ms = lists(*every)
    density, epsilon, width = 0.6, 0.3, shape[-1]
    pruned = []
    for stream, tau in enumerate(reference.deltas(ms, b)):
        chances = uniform(mixed_key(KEY, stream), 0, base.flatten()).tolist()
        odds = [
            p
            for first in range(0, len(tau), width)
            for p in reference.della_odds(tau[first : first + width], density, epsilon)
        ]
        pruned.append([x / p if u < p else 0.0 for x, p, u in zip(tau, odds, chances, strict=True)])
    options = {"density": density, "epsilon": epsilon, "key": KEY}
    exact = reference.add(b, reference.elect_and_average(pruned, [1.0] * 3))
    assert close(merge("della", models[0], models[1:], base, **options), exact, every, factor=99)
    exact = reference.add(b, reference.weighted(pruned, [1.0, 1.0, 1.0]))
    found = merge("della-linear", models[0], models[1:], base, **options)
    assert close(found, exact, every, factor=99)


@given(seeds, sizes, st.integers(1, 3), st.floats(0.01, 1.0))
@few
def test_sce_is_the_papers(seed, shape, count, density):
    base, *models = every = draws(seed, shape, 1 + count, torch.float64)
    b, *ms = lists(*every)
    exact = reference.sce(ms, b, density, 0.9)
    found = merge("sce", models[0], models[1:], base, density=density, scale=0.9)
    # The sums of squares are float64 here; float32 would add an error of the weights.
    assert close(found, exact, every, factor=64)


@given(seeds, sizes, st.integers(1, 3), st.integers(1, 3))
@few
def test_consensus_keeps_what_enough_models_need(seed, shape, count, agreement):
    base, *models = every = draws(seed, shape, 1 + count)
    b, *ms = lists(*every)
    exact = reference.consensus_ta(ms, b, 0.6, agreement, 0.5)
    found = merge("consensus-ta", models[0], models[1:], base, agreement=agreement, scale=0.5)
    assert close(found, exact, every)


@given(seeds, sizes, st.floats(-0.5, 1.5))
@few
def test_slerp_and_nuslerp_follow_the_arc(seed, shape, t):
    base, mllm, reasoner = every = draws(seed, shape, 2)
    b, m, r = lists(*every)
    found = merge("slerp", mllm, [reasoner], t=t)
    assert close(found, reference.slerp(m, r, t), every, factor=99)
    pair = {"mllm_weight": 1 - t, "weights": [t]}
    assert close(
        merge("nuslerp", mllm, [reasoner], **pair), reference.slerp(m, r, t), every, factor=99
    )
    taus = reference.deltas([m, r], b)
    exact = reference.add(b, reference.slerp(*taus, t))
    assert close(merge("nuslerp", mllm, [reasoner], base, **pair), exact, every, factor=999)


# Shorter ones beside a base are rounding of the base.
@pytest.mark.parametrize(("numel", "length"), [(1, 1e-6), (3, 1e-2), (3, 1e-4), (4096, 1e-4)])
@pytest.mark.parametrize("flatten", [True, False])
def test_a_vector_that_is_short_beside_the_other_keeps_its_angle(numel, length, flatten):
    base, mllm, reasoner = draws(3, (numel,), 2)
    along = mllm - base
    for step in (-along, (reasoner - base).roll(1)):  # opposite; at some angle
        short = base + length * step if numel > 1 else -length * mllm
        inputs = (mllm, [short]) if numel == 1 else (mllm, [short], base)
        found = merge("nuslerp", *inputs, flatten=flatten, mllm_weight=0.5, weights=[0.5])
        b, m, r = lists(base if numel > 1 else torch.zeros(1), mllm, short)
        exact = reference.add(b, reference.slerp(*reference.deltas([m, r], b), 0.5))
        assert close(found, exact, (base, mllm, short), factor=999)


@pytest.mark.parametrize("column_wise", [False, True])
def test_nuslerp_takes_rows_or_columns_one_by_one(column_wise):
    base, mllm, reasoner = draws(5, (6, 4), 2)
    found = merge(
        "nuslerp",
        mllm,
        [reasoner],
        base,
        flatten=False,
        column_wise=column_wise,
        weights=[0.3],
        mllm_weight=0.7,
    )
    if column_wise:
        base, mllm, reasoner, found = base.T, mllm.T, reasoner.T, found.T
    for b, m, r, row in zip(base, mllm, reasoner, found, strict=True):
        taus = reference.deltas(lists(m, r), *lists(b))
        exact = reference.add(*lists(b), reference.slerp(*taus, 0.3))
        assert close(row, exact, [b, m, r], factor=99)


@pytest.mark.parametrize("variant", ["paper", "mergekit"])
def test_nuslerp_by_columns_takes_a_vector_whole(variant):
    base, mllm, reasoner = draws(5, (9,), 2)
    options = {"flatten": False, "weights": [0.3], "mllm_weight": 0.7, "variant": variant}
    by_columns = merge("nuslerp", mllm, [reasoner], base, column_wise=True, **options)
    by_rows = merge("nuslerp", mllm, [reasoner], base, column_wise=False, **options)
    assert torch.equal(by_columns, by_rows)
    assert not torch.equal(by_columns, mllm)


def test_slerp_keeps_the_angle_of_close_relatives_exact():
    generator = torch.Generator().manual_seed(1)
    mllm = torch.randn(5000, generator=generator)
    reasoner = mllm + 1e-5 * torch.randn(5000, generator=generator)
    from drift_merge.maths.chunks import in_memory
    from drift_merge.maths.methods.spherical import angle, gram

    found = angle(gram(in_memory(mllm, [reasoner], None, 512)))
    m, r = mllm.double(), reasoner.double()
    unit = m / m.norm() - r / r.norm()
    assert found == pytest.approx(float(unit.norm()), rel=1e-4)  # 1e-5: cos = 1 - 5e-11


@given(seeds, sizes, st.integers(1, 3))
@few
def test_means_on_the_sphere_are_the_references(seed, shape, count):
    _, *models = every = draws(seed, shape, 1 + count, torch.float64)
    b, *ms = lists(*every)
    weights = [1.0, 0.5, 2.0, 0.25][: 1 + count]
    options = {"mllm_weight": weights[0], "weights": weights[1:]}
    found = merge("multislerp", models[0], models[1:], eps=0.0, **options)
    assert close(found, reference.multislerp(ms, weights), every, factor=99)
    if len(b) > 1:  # opposite scalars have no Karcher mean
        found = merge("karcher", models[0], models[1:], tol=1e-12, max_iter=200, **options)
        assert close(found, reference.karcher(ms, weights), every, factor=10**7)  # acos near 1


def test_the_karcher_mean_of_task_vectors_is_the_references():
    base, *models = every = draws(11, (4, 8), 3, torch.float64)
    b, *ms = lists(*every)
    weights = [1.0, 0.5, 2.0]
    options = {"mllm_weight": weights[0], "weights": weights[1:], "tol": 1e-12, "max_iter": 200}
    found = merge("karcher", models[0], models[1:], base, **options)
    exact = reference.add(b, reference.karcher(reference.deltas(ms, b), weights))
    assert close(found, exact, every, factor=10**7)


@given(seeds, sizes, st.integers(1, 3))
@few
def test_model_stock_is_the_papers_ratio(seed, shape, count):
    base, *models = every = draws(seed, shape, 1 + count)
    b, *ms = lists(*every)
    found = merge("model-stock", models[0], models[1:], base)
    assert close(found, reference.model_stock(ms, b), every, factor=99)


def test_model_stock_filter_wise_takes_rows_one_by_one():
    base, *models = draws(6, (5, 4), 3)
    found = merge("model-stock", models[0], models[1:], base, filter_wise=True)
    for index, row in enumerate(found):
        b, *ms = lists(base[index], *(m[index] for m in models))
        assert close(row, reference.model_stock(ms, b), [base, *models], factor=99)


@given(seeds, st.sampled_from([(1, 6), (4, 8), (9, 3)]))
@few
def test_arcee_fusion_swaps_what_lies_beyond_the_fence(seed, shape):
    _, mllm, reasoner = every = draws(seed, shape, 2, torch.float64)
    exact = reference.arcee_fusion(mllm.tolist(), reasoner.tolist())
    assert close(merge("arcee-fusion", mllm, [reasoner]), exact, every)


def test_passthrough_is_the_reasoner_times_its_scale():
    _, mllm, reasoner = draws(1, (8,), 2)
    assert torch.equal(merge("passthrough", mllm, [reasoner]), reasoner)
    assert torch.equal(merge("passthrough", mllm, [reasoner], scale=0.5), reasoner * 0.5)


def test_a_prior_on_disk_is_added_as_it_is():
    _, mllm, delta = draws(1, (8,), 2)
    found = merge("inject", mllm, [delta], scale=0.25, is_delta=True)
    assert torch.equal(found, mllm.add(delta, alpha=0.25))


def test_every_method_says_what_it_is():
    for name, method in METHODS.items():
        assert name == method.name
        assert method.combine.__doc__
        assert method.formula
        assert method.paper
        assert method.formula.isascii()
        for variant in method.variants:
            assert settings_for(name, (2, 2), variant=variant).variant == variant
