"""Whole searches on small checkpoints, by the Python face: the same code as the command's."""

import json
import re
import shlex
import sys

import pytest
import torch

import drift_merge
from drift_merge.errors import AlignmentError, EvaluationError, OutputError, RecipeError
from tests import checkpoints as c
from tests.runs import as_tensor
from tests.training import toys

optuna = pytest.importorskip("optuna")

SPACE = ["weight=0:0.4"]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return c.make_pair(tmp_path_factory.mktemp("pair"))


def recipe_of(pair, **values):
    values = {"modules": "attn,mlp,norm"} | values
    return drift_merge.Recipe(
        method="linear", reasoners=(str(pair.reasoner),), mllm=str(pair.mllm), **values
    )


def weight_of(path):
    """The weight that a directory was merged with; 0 of the mllm."""
    if not (path / "drift_merge.json").exists():
        return 0.0
    return (drift_merge.open_merge(path).manifest["parameters"]["weights"] or [0.1])[0]


def near(goal):
    return lambda path: -((weight_of(path) - goal) ** 2)


def search(pair, objective, space=SPACE, **more):
    recipe = more.pop("recipe", None) or recipe_of(pair)
    return drift_merge.search(recipe, space, objective, progress=False, threads=1, **more)


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


@pytest.mark.parametrize("is_fused", [False, True])
def test_a_live_model_is_patched_to_what_the_checkpoint_would_hold_and_put_back(tmp_path, is_fused):
    toy = toys.make_toy(tmp_path, stored="BF16")
    before = toys.memory_tensors(toy.pair.mllm)
    before = toys.fuse(before) if is_fused else before
    model = toys.holder({name: tensor.clone() for name, tensor in before.items()})
    model.requires_grad_(False)
    seen = []

    def objective(live):
        assert live is model
        seen.append({name: p.detach().clone() for name, p in live.named_parameters()})
        return float(len(seen))

    found = search(toy.pair, objective, ["weight=0.1,0.3"], model=model, trials=2)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]), name
        assert not parameter.requires_grad
    unmerged, default, *trials = seen
    assert all(torch.equal(unmerged[name], before[name]) for name in before)
    by_weight = {0.1: default}
    by_weight |= {
        t["parameters"]["weight"]: s for t, s in zip(found["trials"], trials, strict=True)
    }
    for weight, patched in by_weight.items():
        out = tmp_path / f"merge-{weight}"
        drift_merge.linear(
            str(toy.pair.reasoner), str(toy.pair.mllm), out, weights=weight, progress=False
        )
        expected = toys.memory_tensors(out)
        expected = toys.fuse(expected) if is_fused else expected
        assert all(torch.equal(patched[name], expected[name]) for name in expected)
        assert any(not torch.equal(patched[name], before[name]) for name in before)


def test_another_model_than_the_mllm_is_not_patched(tmp_path):
    toy = toys.make_toy(tmp_path, stored="BF16")
    tensors = toys.memory_tensors(toy.pair.mllm)
    model = toys.holder({name: tensor + 1 for name, tensor in tensors.items()})
    with pytest.raises(AlignmentError, match="the model is not mllm"):
        search(toy.pair, pytest.fail, model=model)


@pytest.mark.slow
def test_null_reasoners_are_as_far_away_in_random_directions(tmp_path):
    toy = toys.make_toy(tmp_path, stored="BF16")
    out = tmp_path / "best"
    found = search(toy.pair, near(0.2), output=out, trials=2, null="random")
    null = tmp_path / "best.search" / "null-1"
    assert found["base_recipe"]["reasoner"] == str(null)
    stored = {n: as_tensor(t).double() for n, t in c.read_tensors(null).items()}
    mllm = {n: as_tensor(t).double() for n, t in c.read_tensors(toy.pair.mllm).items()}
    deltas, num_random = toy.deltas(), 0
    for name, origin in mllm.items():
        canonical = name.removeprefix("model.")
        if canonical not in deltas:
            assert torch.equal(stored[name], origin), name
            continue
        delta, random = deltas[canonical].double(), stored[name] - origin
        # float32 holds each entry to half a unit in the last place of the larger of both.
        tolerance = 2**-23 * float(origin.abs().max()) * origin.numel() ** 0.5
        assert float(random.norm()) == pytest.approx(float(delta.norm()), rel=1e-5, abs=tolerance)
        if delta.numel() >= 64:
            cosine = float((random * delta).sum() / random.norm() / delta.norm())
            assert abs(cosine) < 5 / delta.numel() ** 0.5
            z = random / random.std()
            assert abs(float((z**4).mean()) - 3) < 5 * (96 / z.numel()) ** 0.5  # normal
            num_random += 1
    assert num_random > 5
    with pytest.raises(RecipeError, match="begun with another sources and null"):
        search(toy.pair, near(0.2), output=out, trials=2)


@pytest.mark.slow
def test_the_example_of_the_guide_runs(tmp_path, monkeypatch):
    from drift_merge import guides
    from drift_merge.cli.commands.demo import make_pair

    make_pair(tmp_path / "demo")
    monkeypatch.chdir(tmp_path)
    code = guides.text_of("search").split("```py\n")[1].split("```")[0]
    exec(compile(code, "the guide", "exec"), {})
    assert (tmp_path / "best-py" / "model.safetensors").is_file()


@pytest.fixture
def command(call, pair, tmp_path, monkeypatch):
    """The command, in a folder with a recipe and a program that evaluates."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").write_text(
        f"method: linear\nreasoner: {pair.reasoner}\nmllm: {pair.mllm}\n"
    )
    (tmp_path / "evaluate.py").write_text(
        "import json, os, sys\n"
        "file = os.path.join(sys.argv[1], 'drift_merge.json')\n"
        "weight = 0.0\n"
        "if os.path.exists(file):\n"
        "    weight = (json.load(open(file))['parameters']['weights'] or [0.1])[0]\n"
        "right = [float(i < 100 * weight) for i in range(100)]\n"
        "json.dump(right, open(os.path.join(sys.argv[2], 'right.json'), 'w'))\n"
        "print('accuracy', sum(right) / 100)\n"
    )
    program = f"{sys.executable} -S evaluate.py {{model}} {{out}}"

    def run(*words):
        return call(
            *("drift-merge", "search", "recipe.yaml", "--evaluate", program, "-o", "best"),
            *("--items", "right.json:*", "--threads", "1", *words),
        )

    return run


def test_the_command_shows_its_plan_its_table_one_object_and_its_page(command, call, tmp_path):
    result = command("--space", "weight=0.1,0.4", "--dry-run")
    assert result.code == 0, result.err
    assert "weight of linear" in result.out
    assert not (tmp_path / "best.search").exists()
    result = command("--space", "weight=0.1,0.4", "--trials", "2")
    assert result.code == 0, result.err
    assert re.search(r"best \(trial \d\) +validation +0\.4 +mllm .* better", result.out)
    assert "Note [validation]" in result.err
    again = command("--space", "weight=0.1,0.4", "--trials", "2", "--json")
    assert again.json["validation"]["best"]["values"] == {"score": 0.4}
    assert json.loads((tmp_path / "best.search" / "search.json").read_text()) == again.json
    report = ("drift-merge", "report", "best.search", "-o", "page.html")
    page = call(*report, "--json").json
    assert [t["values"] for t in page["trials"]] == [t["values"] for t in again.json["trials"]]
    assert page["verdict"]["sentences"][0] in call(*report).err
    commands = dict(page["commands"])
    (tmp_path / "recipe.yaml").write_text(commands["The recipe"].split("\n", 1)[1][: -len("END")])
    for label in ("Search again, where the program is", "Make the best again"):
        assert call(*shlex.split(commands[label]), "--dry-run").code == 0, label
    refused = call(*report, "--stable-rank")
    assert refused.code == 2
    assert "drift-merge report best --stable-rank" in refused.err


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ((), "--space"),
        (("--space", "density=0:1"), "no option density"),
        (("--space", "weight=0:1", "--final", "prog"), "{model}"),
        (("--space", "weight=0:1", "--metric", "a.json"), "FILE:path"),
        (("--space", "weight=0:1", "--minimize", "loss"), "no such metric"),
        (("--space", "weight=0:1", "--sampler", "tpee"), "tpee"),
    ],
)
def test_usage_errors_of_the_command(command, words, named, tmp_path):
    result = command(*words)
    assert result.code == 2
    assert named in result.err
    assert not (tmp_path / "best.search").exists()


def test_without_optuna_the_extra_is_named(pair, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(RecipeError, match=r"drift_merge\[search\]"):
        search(pair, pytest.fail)
