"""The page of a search: its numbers are those of `search.json`, and every end of one has a page."""

import copy
import json
import shlex

import pytest

import drift_merge
from drift_merge.errors import CheckpointError, EvaluationError, SourceError
from drift_merge.reports.pages.page import data_of, to_html
from drift_merge.searches.pages.page import describe_search, open_search
from drift_merge.storage.manifests import to_json
from tests import checkpoints as c

pytest.importorskip("optuna")


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return c.make_pair(tmp_path_factory.mktemp("pair"))


def weight_of(path):
    if not (path / "drift_merge.json").exists():
        return 0.0
    return (drift_merge.open_merge(path).manifest["parameters"]["weights"] or [0.1])[0]


def search(pair, objective, **more):
    recipe = drift_merge.Recipe(
        method="linear", reasoners=(str(pair.reasoner),), mllm=str(pair.mllm), modules="attn"
    )
    space = ["weight=0.05:0.4", "modules=attn|attn,norm"]
    how = {"sampler": "random", "progress": False, "threads": 1} | more
    return drift_merge.search(recipe, space, objective, **how)


@pytest.fixture(scope="module")
def made(pair, tmp_path_factory):
    """The folder of a search of two metrics, one of whose trials fails."""
    calls = []

    def objective(path):
        calls.append(path)
        weight = weight_of(path)
        if len(calls) == 5:
            raise ValueError("no score for this one\nsaid the program")
        right = round(100 * weight)
        items = {"a": {str(i): float(i < right) for i in range(100)}}
        return drift_merge.Scores({"a": right / 100, "b": weight**2}, items)

    # In memory, as the database takes most of the time; its folder is written below.
    found = search(pair, objective, trials=7, metrics=("a", "b"), minimize=("b",))
    folder = tmp_path_factory.mktemp("search") / "best.search"
    folder.mkdir()
    (folder / "search.json").write_bytes(to_json(found))
    return folder


@pytest.fixture
def found(made):
    return json.loads((made / "search.json").read_text())


def page_of(made, found):
    """The data of a page, read back from it."""
    return data_of(to_html(describe_search(made, found)))


def chart(document, key):
    charts = [x for section in document["sections"] for x in section["charts"]]
    return next(x for x in charts if x["key"] == key)


def section(document, key):
    return next(section for section in document["sections"] if section["key"] == key)


def one_metric(found):
    """As if metric a had been the only one."""
    found = copy.deepcopy(found)
    found["metrics"] = found["metrics"][:1]
    for trial in found["trials"]:
        trial["values"] = trial["values"] and {"a": trial["values"]["a"]}
    found["comparisons"] = [row for row in found["comparisons"] if row["metric"] == "a"]
    ended = [trial for trial in found["trials"] if trial["values"]]
    found["best"] = max(ended, key=lambda trial: trial["values"]["a"])["number"]
    found["front"] = [found["best"]]
    return found


def test_charts_hold_the_values_of_the_trials(made, found):
    assert open_search(made) == open_search(made / "search.json") == found
    document = page_of(made, found)
    ended = [t for t in found["trials"] if t["state"] == "complete"]
    assert len(ended) == 6
    close = lambda rows: [pytest.approx(row, rel=1e-7) for row in rows]  # noqa: E731
    for metric in ("a", "b"):
        history = chart(document, f"history-{metric}")
        points = [[t["number"], t["values"][metric], t["number"]] for t in ended]
        assert history["points"] == close(points)
        levels = [found["validation"][role]["values"][metric] for role in ("mllm", "default")]
        assert [level["value"] for level in history["levels"]] == close(levels)
        over = chart(document, f"slice-weight-{metric}")
        weights = [[t["parameters"]["weight"], t["values"][metric], t["number"]] for t in ended]
        assert over["points"] == close(weights)
        assert over["ends"] == [0.05, 0.4]
        rows = {
            row["name"]: row["dots"] for row in chart(document, f"slice-modules-{metric}")["rows"]
        }
        assert list(rows) == ["attn", "attn,norm"]
        assert sorted(n for dots in rows.values() for _, n in dots) == [t["number"] for t in ended]
    pairs = [[t["values"]["a"], t["values"]["b"], t["number"]] for t in ended]
    assert chart(document, "front-a-b")["points"] == close(pairs)
    marks = {trial["number"]: trial["mark"] for trial in document["trials"]}
    assert marks[found["best"]] == "best"
    assert {n for n, m in marks.items() if m in ("best", "front")} == set(found["front"])
    for metric, shares in found["importance"].items():
        rows = chart(document, f"importance-{metric}")["rows"]
        assert {row["name"]: row["bar"] for row in rows} == pytest.approx(shares, rel=1e-7)


def test_the_winner_stands_beside_the_others_with_its_interval_and_verdict(made, found):
    document = page_of(made, found)
    for row in found["comparisons"]:
        if row["paired"] is None:
            continue
        name = {"mllm": "unmerged mllm", "default": "default recipe"}[row["against"]]
        [shown] = [r for r in chart(document, "beside-a")["rows"] if r["name"].startswith(name)]
        wanted = [row["difference"], *(row["paired"][key] for key in ("low", "high", "p"))]
        shown_values = [shown[key] for key in ("value", "low", "high", "p")]
        assert shown_values == pytest.approx(wanted, rel=1e-7)
    single = page_of(made, one_metric(found))
    assert single["verdict"]["label"] == "Better than the unmerged mllm"
    assert f"trial {one_metric(found)['best']} is the best" in single["verdict"]["sentences"][0]
    steps = [y for _, y in chart(single, "history-a")["steps"]]
    assert steps == sorted(steps)
    assert len(steps) == 6
    low = one_metric(found)
    low["metrics"][0]["goal"] = "minimize"
    falling = [y for _, y in chart(page_of(made, low), "history-a")["steps"]]
    assert falling == sorted(falling, reverse=True) != steps


@pytest.mark.parametrize(
    ("change", "label"),
    [
        ({"is_noise": True}, "Within noise"),
        ({"difference": -0.1}, "Worse than the unmerged mllm"),
        (None, "Not known whether it is noise"),
    ],
)
def test_the_verdict_is_that_of_the_comparison_on_held_out_items(made, found, change, label):
    found = one_metric(found)
    [first] = [row for row in found["comparisons"] if row["against"] == "mllm"]
    final = {**first, "on": "final", "paired": change and {**first["paired"], **change}}
    found["comparisons"].append(final)
    document = page_of(made, found)
    assert document["verdict"]["label"] == label
    assert "held-out items" in document["verdict"]["sentences"][1]


def test_failed_trials_are_named_by_what_they_said(made, found):
    html = to_html(describe_search(made, found))
    [number] = [t["number"] for t in found["trials"] if t["state"] == "failed"]
    assert chart(data_of(html), "history-a")["failed"] == [number]
    assert f"<b>Trial {number} [ValueError]</b> no score for this one" in html
    assert "<pre><code>said the program</code></pre>" in html
    again = copy.deepcopy(found)
    again["trials"][0] |= {k: again["trials"][number][k] for k in ("state", "values", "error")}
    assert f"<b>Trials 0, {number} [ValueError]</b>" in to_html(describe_search(made, again))


def test_a_pruned_trial_is_shown_by_its_last_rung(made, found):
    found = one_metric(found)
    number = next(t["number"] for t in found["trials"] if t["number"] not in found["front"])
    rungs = [{"limit": "10", "value": 0.2}, {"limit": "30", "value": 0.3}]
    found["trials"][number] |= {"state": "pruned", "values": None, "rungs": rungs, "error": None}
    document = page_of(made, found)
    assert [number, 0.3, number] in chart(document, "history-a")["points"]
    assert number not in [n for *_, n in chart(document, "slice-weight-a")["points"]]
    rows = section(document, "trials")["tables"][0]["rows"]
    assert rows[number][:2] == [f"trial {number}", "stopped after 30"]


def test_one_trial_is_enough(made, found):
    found = one_metric(found)
    found["trials"] = [t for t in found["trials"] if t["number"] == found["best"]]
    found |= {"importance": {}, "comparisons": [], "space": found["space"][:1]}
    document = page_of(made, found)
    assert "4 complete trials" in section(document, "importance")["missing"]
    assert chart(document, "slice-weight-a")["points"][0][2] == found["best"]
    assert "front" not in [s["key"] for s in document["sections"]]
    assert document["verdict"]["label"] == "The best trial"


def test_a_search_all_of_whose_trials_failed_leaves_their_errors(pair, tmp_path):
    def objective(path):
        if path != pair.mllm:
            raise OSError("disk on fire")
        return 0.5

    out = tmp_path / "best"
    with pytest.raises(EvaluationError, match=r"none of 2 trials") as caught:
        search(pair, objective, output=out, trials=2)
    folder = tmp_path / "best.search"
    assert f"drift-merge report {folder}" in caught.value.remedy
    assert not out.exists()
    document = page_of(folder, open_search(folder))
    assert document["verdict"]["label"] == "No trial has ended with a score"
    [failure] = section(document, "failures")["failures"]
    assert (failure["trials"], failure["message"]) == ([0, 1], "disk on fire")
    assert chart(document, "history-score")["levels"] == [{"name": "unmerged mllm", "value": 0.5}]


def test_what_is_no_ended_search_is_refused(tmp_path, found):
    with pytest.raises(SourceError, match="has not ended"):
        open_search(tmp_path)
    (tmp_path / "search.json").write_text(json.dumps({**found, "schema": 2}))
    with pytest.raises(CheckpointError, match="version 2"):
        open_search(tmp_path)
    (tmp_path / "search.json").write_text("{")
    with pytest.raises(CheckpointError, match="cannot be read"):
        open_search(tmp_path)


def test_the_command_of_the_page_is_that_of_the_search(made, found):
    found = one_metric(found) | {
        "evaluate": "python evaluate.py {model} --limit {limit}",
        "final_evaluate": "python evaluate.py {model} --held-out",
        "metric_places": ['a=scores.json:results."acc,none"'],
        "item_places": ["a=right.json:*"],
        "rung_limits": ["10", "all"],
    }
    commands = dict(page_of(made, found)["commands"])
    words = shlex.split(commands["Search again, where the program is"])
    assert words[:3] == ["drift-merge", "search", "recipe.yaml"]
    pairs = list(zip(words[3::2], words[4::2], strict=True))
    assert pairs == [
        ("--space", "weight=0.05:0.4"),
        ("--space", "modules=attn|attn,norm"),
        ("--evaluate", "python evaluate.py {model} --limit {limit}"),
        ("--metric", 'a=scores.json:results."acc,none"'),
        ("--items", "a=right.json:*"),
        ("--final", "python evaluate.py {model} --held-out"),
        ("--rungs", "10,all"),
        ("--sampler", "random"),
        ("--seed", "0"),
        ("--trials", "7"),
        ("-o", "again/"),
    ]
    assert "modules: attn\n" in commands["The recipe"]
    assert commands["Make the best again"].startswith(f"drift-merge run {made}/best.yaml")
