"""Methods on singular directions against float64, fusion-bench's numbers, and their own laws."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from drift_merge.maths.methods import METHODS
from tests import reference_spectral as reference
from tests.maths.methods.driver import merge
from tests.strategies import few

RECORD = json.loads(
    (Path(__file__).parents[2] / "golden" / "methods" / "fusion_bench.json").read_text()
)
SHAPES = st.sampled_from([(12, 8), (8, 12), (9, 9), (5, 1), (1, 6), (30, 2)])
SEEDS = st.integers(0, 2**31)
EPS = torch.finfo(torch.float32).eps
STEPPED = ("chat-vector", "inject", "linear", "task-arithmetic")
OURS = {
    "star": lambda taus: reference.star(taus, 40.0),
    "tsv-m": reference.tsv_m,
    "iso-c": reference.iso_c,
    "iso-cts": lambda taus: reference.iso_cts(taus, 0.8),
    "swudi": lambda taus: reference.swudi(taus, 300.0, 0.85),
    "aswudi": reference.aswudi,
}


def draws(seed, shape, count):
    """A base and models, in float64: singular directions are then exact far beyond float32."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(shape, generator=generator, dtype=torch.float64)
    noise = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(count))
    return [base, *(base + 0.3 * one for one in noise)]


def near(found, exact, *, bound=1e-9):
    scale = max(1.0, float(exact.abs().max()))
    return torch.allclose(found.double(), exact, rtol=0.0, atol=bound * scale)


# The spectral step on a delta.


@pytest.mark.parametrize("norm", ["frobenius", "nuclear", "none"])
@given(seed=SEEDS, shape=SHAPES, rank=st.integers(1, 4))
@few
def test_chat_vector_of_a_rank_adds_the_leading_directions_at_the_norm(norm, seed, shape, rank):
    base, mllm, one, two = draws(seed, shape, 3)
    found = merge("chat-vector", mllm, [one, two], base, rank=rank, norm=norm, weights=[0.05, 0.1])
    exact = mllm + 0.05 * reference.leading(one - base, rank, norm)
    exact += 0.1 * reference.leading(two - base, rank, norm)
    assert near(found, exact)


@given(seed=SEEDS, shape=SHAPES, rank=st.integers(1, 4))
@few
def test_linear_and_inject_without_a_base_take_the_difference_from_the_mllm(seed, shape, rank):
    _, mllm, one = draws(seed, shape, 2)
    exact = mllm + 0.1 * reference.leading(one - mllm, rank, "frobenius")
    assert near(merge("linear", mllm, [one], rank=rank), exact)
    assert near(merge("inject", mllm, [one], rank=rank), exact)


@given(seed=SEEDS, shape=SHAPES)
@few
def test_task_arithmetic_gives_the_interpolation_form_of_the_preprint(seed, shape):
    """V + w (B - V) + w N_1(R - B): only the reasoners' task vectors take the step."""
    base, mllm, one = draws(seed, shape, 2)
    options = {"rank": 1, "weights": [0.05], "mllm_weight": 0.95}
    found = merge("task-arithmetic", mllm, [one], base, **options)
    step = reference.leading(one - base, 1, "frobenius")
    assert near(found, mllm + 0.05 * (base - mllm) + 0.05 * step)
    normalized = merge("task-arithmetic", mllm, [one], base, **options, normalize=True, scale=2.0)
    assert near(normalized, base + 2.0 * (0.95 * (mllm - base) + 0.05 * step))


@given(seed=SEEDS, shape=SHAPES, eta=st.sampled_from([5.0, 40.0, 90.0]))
@few
def test_eta_keeps_the_fewest_directions_of_that_share(seed, shape, eta):
    base, mllm, one = draws(seed, shape, 2)
    rank = reference.star_rank(one - base, eta)
    exact = mllm + reference.leading(one - base, rank, "nuclear")
    assert near(merge("chat-vector", mllm, [one], base, eta=eta, norm="nuclear"), exact)


@given(seed=SEEDS, shape=SHAPES)
@few
def test_bands_give_each_direction_its_factor_and_the_open_one_the_rest(seed, shape):
    base, mllm, one = draws(seed, shape, 2)
    parts = reference.svd(one - base)
    closed = [0.1, 0.1, 0.0, -0.5]
    found = merge("chat-vector", mllm, [one], base, bands="3:4=-0.5,0:2=0.1")
    assert near(found, mllm + reference.directions(parts, closed))
    opened = [1.0, 0.1, *[0.25] * 20]
    found = merge("chat-vector", mllm, [one], base, bands="0:1=1,1:2=0.1,2:=0.25")
    assert near(found, mllm + reference.directions(parts, opened))
    assert near(merge("chat-vector", mllm, [one], base, bands=":=0.3"), mllm + 0.3 * (one - base))


@given(seed=SEEDS, shape=SHAPES)
@few
def test_gates_give_each_direction_its_factor_and_the_others_nothing(seed, shape):
    base, mllm, one = draws(seed, shape, 2)
    gates = torch.tensor([0.9, 0.2, 0.4][: min(shape)])
    found = merge("chat-vector", mllm, [one], base, gates=gates)
    exact = mllm + reference.directions(reference.svd(one - base), gates.double().tolist())
    assert near(found, exact)


@pytest.mark.parametrize("name", STEPPED)
@given(seed=SEEDS)
@few
def test_a_delta_of_a_smaller_rank_is_added_whole(name, seed):
    base, mllm, _ = draws(seed, (40, 30), 2)
    generator = torch.Generator().manual_seed(seed)
    low = torch.randn(40, 2, generator=generator).double() @ torch.randn(2, 30).double()
    origin = base if METHODS[name].base == "required" else mllm
    options = {"rank": 5, "weights": [0.5]} | ({"mllm_weight": 1.0} if "task" in name else {})
    used = base if METHODS[name].base == "required" else None
    found = merge(name, mllm, [origin + low], used, **options)
    factor = 0.05 if name == "inject" else 0.5
    assert near(found, mllm + factor * low, bound=1e-8)


@pytest.mark.parametrize("options", [{"rank": 1}, {"bands": "0:2=0.5"}, {"eta": 30.0}])
def test_equal_models_give_that_model_to_the_sign_of_zero(options):
    one = torch.randn(6, 5)
    one[0, 0], one[1, 1] = -0.0, 0.0
    for name in STEPPED:
        base = one if METHODS[name].base == "required" else None
        found = merge(name, one, [one.clone()], base, **options)
        assert found.view(torch.int32).equal(one.view(torch.int32))


@pytest.mark.parametrize("name", [*STEPPED[:3], "star"])
@given(seed=SEEDS, power=st.integers(-40, 20))
@few
def test_scaling_the_models_by_a_power_of_two_scales_the_result_to_the_bit(name, seed, power):
    base, mllm, one = (t.float() for t in draws(seed, (12, 8), 2))
    used = base if METHODS[name].base == "required" else None
    options = {} if name == "star" else {"rank": 2}
    plain = merge(name, mllm, [one], used, **options)
    factor = 2.0**power
    scaled = None if used is None else used * factor
    found = merge(name, mllm * factor, [one * factor], scaled, **options)
    assert found.equal(plain * factor)


def test_repeated_singular_values_give_one_answer_where_all_of_them_are_kept():
    base = torch.zeros(6, 6, dtype=torch.float64)
    tau = torch.diag(torch.tensor([2.0, 2.0, 2.0, 1.0, 1.0, 1.0], dtype=torch.float64))
    found = merge("chat-vector", base, [tau], base, rank=3, norm="none")
    assert near(found, torch.diag(torch.tensor([2.0, 2.0, 2.0, 0, 0, 0]).double()))


def test_vectors_and_scalars_keep_the_plain_weight():
    base, mllm, one = draws(1, (7,), 2)
    assert near(merge("chat-vector", mllm, [one], base, rank=1), mllm + one - base)
    assert near(merge("linear", mllm, [one], rank=1), 0.9 * mllm + 0.1 * one)


def test_a_matrix_with_nan_becomes_nan_for_the_engine_to_name():
    base, mllm, one = (t.float() for t in draws(1, (6, 5), 2))
    one[2, 3] = torch.nan
    for name, options in (("chat-vector", {"rank": 1}), ("tsv-m", {}), ("iso-c", {})):
        assert merge(name, mllm, [one], base, **options).isnan().all()


# Methods that merge subspaces.


@pytest.mark.parametrize("name", OURS)
@given(seed=SEEDS, shape=st.sampled_from([(12, 8), (8, 12), (9, 9)]), count=st.integers(1, 2))
@few
def test_a_merge_of_subspaces_is_the_papers_formula(name, seed, shape, count):
    base, *models = draws(seed, shape, 1 + count)
    weights = [0.5, 2.0][:count]
    found = merge(name, models[0], models[1:], base, weights=weights, mllm_weight=0.75, scale=0.5)
    weighted = zip(models, [0.75, *weights], strict=True)
    taus = [w * (model - base) for model, w in weighted]
    assert near(found, base + 0.5 * OURS[name](taus), bound=1e-7)


@pytest.mark.parametrize("name", OURS)
def test_what_is_no_matrix_gets_the_mean(name):
    base, mllm, one = draws(3, (9,), 2)
    assert near(merge(name, mllm, [one], base), base + ((mllm - base) + (one - base)) / 2)


@pytest.mark.parametrize("name", OURS)
def test_models_that_have_not_moved_give_the_base(name):
    base = torch.randn(6, 5)
    base[0, 0] = -0.0
    found = merge(name, base.clone(), [base.clone()], base)
    assert found.view(torch.int32).equal(base.view(torch.int32))


@pytest.mark.parametrize("name", ["iso-c", "iso-cts", "tsv-m", "svc", "magmax"])
@pytest.mark.parametrize("count", [2, 3])
def test_the_numbers_are_those_of_fusion_bench(name, count):
    taus = [torch.tensor(t, dtype=torch.float64).view(RECORD["shape"]) for t in RECORD["taus"]]
    [case] = [c for c in RECORD["cases"] if (c["method"], c["models"]) == (name, count)]
    base = torch.zeros(RECORD["shape"], dtype=torch.float64)
    method, options = (name, {}) if name != "svc" else ("task-arithmetic", {"calibrate": "svc"})
    found = merge(method, taus[0], taus[1:count], base, **options)
    exact = torch.tensor(case["result"], dtype=torch.float64)
    assert near(found.flatten(), exact, bound=1e-12)
    assert RECORD["versions"]["fusion-bench"] == "0.2.33"


@pytest.mark.parametrize("count", [2, 3])
def test_the_closed_form_disturbs_less_than_the_300_steps_of_wudi(count):
    taus = [torch.tensor(t, dtype=torch.float64).view(RECORD["shape"]) for t in RECORD["taus"]]
    [case] = [c for c in RECORD["cases"] if (c["method"], c["models"]) == ("wudi", count)]
    theirs = torch.tensor(case["result"], dtype=torch.float64).view(RECORD["shape"])
    base = torch.zeros(RECORD["shape"], dtype=torch.float64)
    ours = merge("swudi", taus[0], taus[1:count], base, time=1e6, share=1.0)
    gradient = torch.randn(RECORD["shape"], dtype=torch.float64)
    least = reference.wudi_objective(ours, taus[:count])
    assert least < 0.9 * reference.wudi_objective(theirs, taus[:count])
    for step in (1e-3, -1e-3):  # a minimum
        assert reference.wudi_objective(ours + step * gradient, taus[:count]) > least


# Calibration.


@pytest.mark.parametrize("name", ["task-arithmetic", "ties", "breadcrumbs", "tsv-m", "iso-c"])
@given(seed=SEEDS, shape=SHAPES)
@few
def test_calibration_works_on_the_result_of_any_method(name, seed, shape):
    base, mllm, one = draws(seed, shape, 2)
    plain = merge(name, mllm, [one], base)
    found = merge(name, mllm, [one], base, calibrate="svc", calibrate_alpha=0.3)
    exact = base + reference.svc(plain - base, [mllm - base, one - base], 0.3)
    assert near(found, exact, bound=1e-6)


def test_two_equal_models_are_counted_once():
    base, mllm, _ = draws(5, (12, 8), 2)
    found = merge("task-arithmetic", mllm, [mllm], base, calibrate="svc")
    assert near(found, mllm)


def test_a_model_without_a_share_in_a_direction_is_left_out_of_its_mean():
    base = torch.zeros(4, 4, dtype=torch.float64)
    one, other = base.clone(), base.clone()
    one[0, 0], other[1, 1] = 3.0, 2.0
    found = merge("task-arithmetic", one, [other], base, calibrate="svc")
    assert near(found, one + other)


def test_calibration_of_matrices_only():
    base, mllm, one = draws(7, (9,), 2)
    plain = merge("task-arithmetic", mllm, [one], base)
    assert merge("task-arithmetic", mllm, [one], base, calibrate="svc").equal(plain)


# Entry by entry.


@pytest.mark.parametrize("variant", ["paper", "mergekit"])
@given(seed=SEEDS, count=st.integers(1, 3))
@few
def test_ram_tells_entries_by_how_many_have_changed_them(variant, seed, count):
    base, *models = draws(seed, (6, 7), 1 + count)
    generator = torch.Generator().manual_seed(seed)
    models = [
        torch.where(torch.rand(6, 7, generator=generator) < 0.5, base, model) for model in models
    ]
    taus = [(model - base).flatten().tolist() for model in models]
    found = merge("ram", models[0], models[1:], base, scale=0.5)
    exact = torch.tensor(reference.ram(taus, 1e-5, [1.0] * len(taus))).double().view(6, 7)
    assert near(found, base + 0.5 * exact, bound=1e-6)
    factors = reference.ram_plus_factors(taus, 1e-5, 0.1, 0.2)
    found = merge("ram-plus", models[0], models[1:], base, variant=variant)
    exact = torch.tensor(reference.ram(taus, 1e-5, factors)).double().view(6, 7)
    assert near(found, base + exact, bound=1e-6)


@given(seed=SEEDS, count=st.integers(1, 3))
@few
def test_magmax_takes_the_largest_and_of_equal_ones_the_last(seed, count):
    base, *models = draws(seed, (6, 7), 1 + count)
    taus = [((model - base) * 4).round() / 4 for model in models]  # many equal magnitudes
    base = (base * 4).round() / 4
    found = merge("magmax", base + taus[0], [base + tau for tau in taus[1:]], base, scale=1.0)
    exact = reference.magmax([tau.flatten().tolist() for tau in taus])
    assert near(found, base + torch.tensor(exact, dtype=torch.float64).view(6, 7))
