"""Options out of their range are refused before anything is written, never a traceback."""

import math

import pytest

from drift_merge.engine import workers, workspace
from drift_merge.errors import RecipeError
from drift_merge.maths.methods import METHODS
from drift_merge.recipes.recipe import Recipe
from tests import checkpoints as c
from tests.light import run_without_torch
from tests.merges.suite import CASES, Case, name_of, run_merge, write_sources

FIRST: dict[str, Case] = {}  # a case for every number that some method takes
for _case in CASES:
    for _name, _value in (METHODS[_case.name].defaults[_case.variant] | _case.options).items():
        if not isinstance(_value, bool | str) and _name not in ("weight", "mllm_weight"):
            FIRST.setdefault(_name, _case)
RANGES = {  # values just outside
    "density": (0.0, -0.1, 1.5),
    "gamma": (-0.1, 1.0),
    "epsilon": (-0.1,),
    "max_iter": (0.0, 2.5),
    "tol": (-1e-5,),
    "eps": (-1e-8,),
    "transition": (-1, 0.5),
    "seed": (0.5,),
}


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    return write_sources(tmp_path_factory.mktemp("sources"), layers=1)


def refused(case, sources, out, match, **changes):
    with pytest.raises(RecipeError, match=match) as caught:
        run_merge(case, sources, out, **changes)
    assert caught.value.remedy
    assert not out.exists()
    assert not out.with_name("out.partial").exists()


@pytest.mark.parametrize("option", FIRST)
def test_numbers_must_be_finite_and_in_their_range(option, sources, tmp_path):
    case = FIRST[option]
    for value in (math.nan, math.inf, -math.inf, *RANGES.get(option, ())):
        options = case.options | {option: value}
        refused(case, sources, tmp_path / "out", option.replace("_", "-"), options=options)


@pytest.mark.parametrize(
    ("name", "option", "value"),
    [
        ("ties", "density", "x"),
        ("ties", "density", True),
        ("ties", "density", None),
        ("task-arithmetic", "normalize", 0.5),
        ("task-arithmetic", "normalize", "yes"),
    ],
)
def test_a_value_of_another_kind_is_refused(name, option, value, sources, tmp_path):
    case = Case(name, "paper", has_base=True)
    refused(case, sources, tmp_path / "out", option, options={option: value})


ZERO_SUM = [Case("linear", "mergekit", False)]
ZERO_SUM += [Case(name, "paper", False) for name in ("multislerp", "karcher")]


@pytest.mark.parametrize("case", ZERO_SUM, ids=name_of)
@pytest.mark.parametrize(("weights", "own"), [((-1.0, 0.0), 1.0), ((0.0,), 0.0), (("[0,-1]",), 1)])
def test_weights_that_are_divided_by_their_sum_must_not_sum_to_zero(
    case, weights, own, sources, tmp_path
):
    weights = (*weights, 0.0) if len(weights) == 1 and isinstance(weights[0], str) else weights
    refused(case, sources, tmp_path / "out", "sum", weights=weights, mllm_weight=own)


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_an_option_that_a_method_does_not_have_is_refused_with_those_it_has(
    case, sources, tmp_path
):
    refused(case, sources, tmp_path / "out", "no option 'densitty'", options={"densitty": 0.2})
    with pytest.raises(RecipeError, match="variant"):
        run_merge(case, sources, tmp_path / "out", variant="papers")


@pytest.mark.parametrize("case", [c for c in CASES if METHODS[c.name].base == "required"])
def test_a_method_on_a_base_is_refused_without_one(case, sources, tmp_path):
    refused(case._replace(has_base=False), sources, tmp_path / "out", "needs a base")


@pytest.mark.parametrize("case", [c for c in CASES if METHODS[c.name].base == "none"])
def test_a_method_without_a_base_is_refused_with_one(case, sources, tmp_path):
    refused(case._replace(has_base=True), sources, tmp_path / "out", "takes no base")


def test_help_and_dry_run_of_every_method_never_import_torch(sources, tmp_path):
    calls = [[0, "drift-merge", "methods"], [0, "drift-merge", "methods", "--json"]]
    for case in CASES:
        words = [case.name, *sources.arguments(case), "-o", str(tmp_path / "out"), "-n", "-v"]
        words += ["--variant", case.variant] if len(METHODS[case.name].variants) > 1 else []
        words += [word for weight in case.weights for word in ("--weight", str(weight))]
        words += [word for name, x in case.options.items() for word in (f"--{name}", str(x))]
        calls += [[0, "drift-merge", *words, "--json"], [0, "drift-merge", case.name, "--help"]]
        if METHODS[case.name].base == "required":
            wrong = [word for word in words if word not in ("--base", str(sources.base))]
            calls += [[2, "drift-merge", *wrong]]
    run_without_torch(calls, tmp_path)


LINEAR = Case("linear", "paper", has_base=False)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_rounding_by_chance_keeps_the_weight_that_nearest_swallows(dtype, sources, tmp_path):
    kept = {}
    for how in ("nearest", "stochastic"):
        made = run_merge(LINEAR, sources, tmp_path / how, weights=(2e-4,), dtype=dtype, round=how)
        kept[how] = made.merge.manifest
    exact = run_merge(LINEAR, sources, tmp_path / "exact", weights=(2e-4,), dtype="float32")
    assert exact.merge.manifest["change_kept"] == 1.0
    assert "change_kept_error" not in kept["nearest"]
    error = kept["stochastic"]["change_kept_error"]
    assert abs(kept["stochastic"]["change_kept"] - 1.0) <= 5 * error
    assert abs(kept["nearest"]["change_kept"] - 1.0) > 5 * error
    assert kept["stochastic"]["rounding_noise"] > 0.0


def test_rounding_by_chance_gives_the_same_bytes_however_it_is_done(sources, tmp_path, monkeypatch):
    values = {"weights": (0.01,), "dtype": "bfloat16", "round": "stochastic"}
    run_merge(LINEAR, sources, tmp_path / "one", **values)
    monkeypatch.setattr(workspace, "CPU_CHUNK", 37)
    monkeypatch.setattr(workers, "PROCESS_BYTES", 0)
    run_merge(LINEAR, sources, tmp_path / "two", threads=2, **values)
    assert c.read_tensors(tmp_path / "one") == c.read_tensors(tmp_path / "two")
    run_merge(LINEAR, sources, tmp_path / "three", round_seed=1, **values)
    assert c.read_tensors(tmp_path / "one") != c.read_tensors(tmp_path / "three")


def test_rounding_by_chance_leaves_what_is_not_changed(sources, tmp_path):
    plain = run_merge(LINEAR, sources, tmp_path / "cast", weights=(0.0,), dtype="float16")
    made = run_merge(
        *(LINEAR, sources, tmp_path / "out"), weights=(0.0,), dtype="float16", round="stochastic"
    )
    assert c.read_tensors(tmp_path / "out") == c.read_tensors(tmp_path / "cast")
    assert made.merge.manifest["counts"] == plain.merge.manifest["counts"]


def test_a_prior_is_not_rounded_by_chance():
    with pytest.raises(RecipeError, match="is for merges"):
        Recipe(method="prior", reasoners=("a",), mllm="b", round="stochastic")
