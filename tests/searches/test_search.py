"""Whole searches on small checkpoints, by the Python face: the same code as the command's."""

import json

import pytest

import drift_merge
from drift_merge.errors import EvaluationError, OutputError, RecipeError
from tests.searches.small import near, recipe_of, search, weight_of

pytest.importorskip("optuna")


@pytest.mark.slow
def test_the_best_is_made_whole_and_everything_else_is_gone(pair, tmp_path):
    seen = []

    def objective(path):
        seen.append(path)
        if path != pair.mllm:
            drift_merge.verify_merge(drift_merge.open_merge(path))
            others = [p for p in path.parent.iterdir() if p != path]
            assert not others  # one output at a time
        return near(0.3)(path)

    out = tmp_path / "best"
    space = ["weight=0:0.4:0.1"]
    found = search(pair, objective, space, output=out, trials=9)
    assert found["sampler"] == "grid"
    assert sorted(t["parameters"]["weight"] for t in found["trials"]) == pytest.approx(
        [0.0, 0.1, 0.2, 0.3, 0.4]
    )
    assert weight_of(out) == pytest.approx(0.3)
    drift_merge.verify_merge(drift_merge.open_merge(out))
    assert not any(path.exists() for path in seen if path != pair.mllm)
    kept = json.loads((tmp_path / "best.search" / "search.json").read_text())
    assert kept == json.loads(json.dumps(found))
    assert not list((tmp_path / "best.search" / "scratch").iterdir())
    again = drift_merge.run(
        tmp_path / "best.search" / "best.yaml", tmp_path / "again", progress=False
    )
    assert again.tensors == drift_merge.open_merge(out).tensors


@pytest.mark.slow
def test_a_rerun_repeats_nothing_and_more_trials_go_on(pair, tmp_path):
    calls = []

    def objective(path):
        calls.append(weight_of(path))
        return near(0.3)(path)

    how = {"output": tmp_path / "best", "sampler": "tpe"}
    first = search(pair, objective, trials=3, **how)
    assert len(calls) == 5  # with the mllm and the default
    assert search(pair, objective, trials=3, **how) == first
    assert len(calls) == 5
    more = search(pair, objective, trials=6, **how)
    assert len(calls) == 8
    assert more["trials"][:3] == first["trials"]
    assert weight_of(tmp_path / "best") == more["trials"][more["best"]]["parameters"]["weight"]


def test_a_point_of_a_grid_that_was_interrupted_is_tried_again_and_none_is_lost(pair, tmp_path):
    calls = []

    def objective(path):
        calls.append(path)
        if len(calls) == 5:  # the mllm, the default, and the third of four points
            raise KeyboardInterrupt
        return near(0.3)(path)

    space, how = ["weight=0.1:0.4:0.1"], {"output": tmp_path / "best", "trials": 4}
    with pytest.raises(KeyboardInterrupt):
        search(pair, objective, space, **how)
    found = search(pair, objective, space, **how)
    assert len(calls) == 7
    weights = sorted(t["parameters"]["weight"] for t in found["trials"])
    assert weights == pytest.approx([0.1, 0.2, 0.3, 0.4])


@pytest.mark.slow
def test_the_same_seed_searches_the_same(pair):
    def drawn(seed):
        found = search(pair, near(0.2), trials=6, sampler="tpe", seed=seed)
        return [t["parameters"] for t in found["trials"]]

    assert drawn(1) == drawn(1) != drawn(2)


def test_a_failing_trial_is_recorded_and_ends_nothing(pair, tmp_path):
    def objective(path):
        if 0.15 < weight_of(path) < 0.25:
            raise ValueError("no score for this one")
        return near(0.3)(path)

    found = search(pair, objective, ["weight=0:0.4:0.1"], trials=5)
    [failed] = [t for t in found["trials"] if t["state"] == "failed"]
    assert failed["error"] == {
        "kind": "ValueError",
        "message": "no score for this one",
        "remedy": "",
    }
    assert failed["values"] is None
    assert len(found["trials"]) == 5


@pytest.mark.parametrize("result", [float("nan"), "high", {"other": 1.0}])
def test_a_search_whose_mllm_has_no_score_ends_at_once(pair, result):
    calls = []

    def objective(path):
        calls.append(path)
        return result

    with pytest.raises((EvaluationError, ValueError)):
        search(pair, objective)
    assert len(calls) == 1


def test_if_every_trial_fails_the_first_error_is_told(pair):
    def objective(path):
        if path != pair.mllm:
            raise OSError("disk on fire")
        return 1.0

    with pytest.raises(EvaluationError, match=r"none of 3 trials.*disk on fire"):
        search(pair, objective, trials=3)


@pytest.mark.slow
def test_several_metrics_give_a_front_and_the_trial_on_its_knee(pair, tmp_path):
    def objective(path):
        weight = weight_of(path)
        return {"reasoning": min(weight, 0.2), "loss": max(weight, 0.2)}

    found = search(
        pair,
        objective,
        ["weight=0:0.4:0.05"],
        trials=9,
        sampler="grid",
        metrics=("reasoning", "loss"),
        minimize=("loss",),
    )
    best = found["trials"][found["best"]]
    assert best["parameters"]["weight"] == pytest.approx(0.2)
    assert found["front"] == [found["best"]]
    assert search(pair, objective, trials=1, metrics=("reasoning", "loss"))["sampler"] == "nsga2"


@pytest.mark.slow
def test_rungs_stop_the_worse_trials_early(pair):
    limits = []

    def objective(path, limit):
        limits.append(limit)
        return near(0.3)(path)

    found = search(
        pair, objective, ["weight=0:0.4:0.05"], trials=9, rungs=("10", "100", "all"), sampler="grid"
    )
    states = [t["state"] for t in found["trials"]]
    pruned = [t for t in found["trials"] if t["state"] == "pruned"]
    assert set(states) == {"complete", "pruned"}
    assert all(t["values"] is None and 1 <= len(t["rungs"]) < 3 for t in pruned)
    assert [r["limit"] for r in found["trials"][found["best"]]["rungs"]] == ["10", "100", "all"]
    assert limits[:2] == ["all", "all"]  # the references on all items
    assert limits.count("10") == 9 > limits.count("all") - 2


def test_items_say_whether_the_best_is_noise_and_final_items_are_others(pair, tmp_path):
    def scored(right):
        items = {str(i): float(i < right) for i in range(100)}
        return drift_merge.Scores({"score": right / 100}, {"score": items})

    found = search(
        pair,
        lambda path: scored(40 + round(100 * weight_of(path))),
        ["weight=0.1,0.3"],
        final=lambda path: scored(50 + (weight_of(path) > 0.2)),
        output=tmp_path / "best",
        trials=2,
    )
    verdicts = {(r["on"], r["against"]): r["paired"]["is_noise"] for r in found["comparisons"]}
    assert verdicts == {
        ("validation", "mllm"): False,
        ("validation", "default"): False,
        ("final", "mllm"): True,
        ("final", "default"): True,
    }
    assert found["final"]["best"]["values"] == {"score": 0.51}
    assert found["final"]["mllm"]["num_items"] == {"score": 100}


@pytest.mark.slow
def test_a_study_is_refused_to_another_search(pair, tmp_path):
    how = {"output": tmp_path / "best", "trials": 1}
    search(pair, near(0.1), **how)
    with pytest.raises(RecipeError, match="begun with another space"):
        search(pair, near(0.1), ["weight=0:0.5"], **how)
    with pytest.raises(RecipeError, match="begun with another recipe"):
        search(pair, near(0.1), recipe=recipe_of(pair, modules="attn"), **how)
    with pytest.raises(RecipeError, match="begun with another metrics"):
        search(pair, near(0.1), metrics=("accuracy",), **how)


def test_an_output_that_is_there_is_refused_before_any_work(pair, tmp_path):
    (tmp_path / "best").mkdir()
    (tmp_path / "best" / "mine.txt").write_text("mine")
    with pytest.raises(OutputError, match="exists already"):
        search(pair, pytest.fail, output=tmp_path / "best")


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"trials": 0}, "--trials"),
        ({"sampler": "tpee"}, "tpe"),
        ({"minimize": ("loss",)}, "no such metric"),
        ({"rungs": (1, 2), "metrics": ("a", "b")}, "several"),
        ({"scratch": "/no/such/dir"}, "--scratch"),
        ({"storage": "nonsense://x:secret@y"}, "cannot be opened"),
        ({"null": "zero"}, "random"),
    ],
)
def test_options_that_cannot_work_are_refused(pair, options, named):
    with pytest.raises(RecipeError, match=named) as caught:
        search(pair, pytest.fail, **options)
    assert "secret" not in str(caught.value)


def test_modules_that_do_not_exist_are_found_before_any_evaluation(pair):
    with pytest.raises(RecipeError, match="foo"):
        search(pair, pytest.fail, ["modules=attn|attn,foo"])
