"""The page of a search: its trials, what decided about them, and the winner beside the others.

All of it is from `search.json`; Optuna is not needed to look at a search.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from drift_merge.errors import SourceError
from drift_merge.reports.pages.document import Document, rounded
from drift_merge.searches.pages.charts import front_charts, histories, importances, slices
from drift_merge.searches.pages.commands import commands_of
from drift_merge.searches.pages.winner import beside, describe_winner
from drift_merge.searches.results import KIND, RESULT, SCHEMA, remarks
from drift_merge.storage.manifests import read_record


def open_search(path: Path) -> dict[str, Any]:
    """The result of a search.

    Args:
        path: its folder, OUT.search, or the `search.json` in it.

    Raises:
        SourceError: the search has not ended.
        CheckpointError: the file is broken, or of a later version.
    """
    file = path if path.is_file() else path / RESULT
    if not file.is_file():
        raise SourceError(
            f"the search in {path} has not ended: it has no {RESULT} yet.",
            remedy="Let it end, or repeat its command, which goes on where it was.",
        )
    return read_record(file, kind=KIND, version=SCHEMA, key="schema")


def describe_search(path: Path, found: Mapping[str, Any]) -> Document:
    """What the page of a search shows.

    Args:
        path: of its folder.
        found: the content of its `search.json`.
    """
    metrics = [metric["name"] for metric in found["metrics"]]
    trials = [_trial(trial, found) for trial in found["trials"]]
    return {
        "kind": "search",
        "title": f"Search: {found['study']}",
        "formula": ", ".join(dimension["text"] for dimension in found["space"]),
        "verdict": describe_winner(found, metrics),
        "notes": [text for code, text in remarks(found) if code != "failed"],
        "trials": trials,
        "sections": [
            beside(found, metrics),
            _history(found, trials, metrics),
            *_front(found, trials, metrics),
            _importance(found),
            _slices(found, trials, metrics),
            _table_of_trials(found, metrics),
            _failures(found),
        ],
        "facts": _facts(found),
        "commands": commands_of(path, found),
    }


def _trial(trial: Mapping[str, Any], found: Mapping[str, Any]) -> dict[str, Any]:
    """One trial as the charts show it; `mark` is how."""
    mark = trial["state"]
    if trial["number"] == found["best"]:
        mark = "best"
    elif trial["number"] in found["front"]:
        mark = "front"
    values = {name: rounded(value) for name, value in (trial["values"] or {}).items()}
    if mark == "pruned" and trial["rungs"]:
        last = trial["rungs"][-1]
        values = {found["metrics"][0]["name"]: rounded(last["value"])}
    shown = {"number": trial["number"], "mark": mark, "values": values}
    shown["parameters"] = {n: _value(v) for n, v in trial["parameters"].items()}
    shown["seconds"] = rounded(sum(trial["seconds"].values()))
    shown["limit"] = trial["rungs"][-1]["limit"] if trial["rungs"] else None
    shown["error"] = (trial["error"] or {}).get("message", "").partition("\n")[0]
    return shown


def _value(value: Any) -> Any:
    return rounded(value) if isinstance(value, float) else value


def _history(
    found: Mapping[str, Any], trials: Sequence[Mapping[str, Any]], metrics: Sequence[str]
) -> dict[str, Any]:
    text = "Every trial in its order, with the best so far."
    if len(metrics) > 1:
        text = "Every trial in its order."
    return {
        "key": "history",
        "title": "History",
        "text": f"{text} Point at a trial, or walk with the arrow keys, to see its values.",
        "missing": "",
        "charts": histories(found, trials),
    }


def _front(
    found: Mapping[str, Any], trials: Sequence[Mapping[str, Any]], metrics: Sequence[str]
) -> list[dict[str, Any]]:
    if len(metrics) < 2:
        return []
    charts = front_charts(found, trials)
    return [
        {
            "key": "front",
            "title": "Pareto front",
            "text": "Diamonds: trials that no other beats in one metric without losing in another. "
            "The best is on the knee, farthest from the line through the ends.",
            "missing": "" if charts else "No trial has ended with a score.",
            "charts": charts,
        }
    ]


def _importance(found: Mapping[str, Any]) -> dict[str, Any]:
    charts = importances(found)
    return {
        "key": "importance",
        "title": "Which parameter decided",
        "text": "Share of each parameter in what sets good trials apart (PED-ANOVA of the complete "
        "trials). Of few trials it is a hint.",
        "missing": ""
        if charts
        else "Not known: it takes 4 complete trials that differ in their scores.",
        "charts": charts,
    }


def _slices(
    found: Mapping[str, Any], trials: Sequence[Mapping[str, Any]], metrics: Sequence[str]
) -> dict[str, Any]:
    charts = slices(found, trials, metrics)
    return {
        "key": "slices",
        "title": "Over each parameter",
        "text": "Complete trials alone; an axis spans what was searched.",
        "missing": "" if charts else "No trial has ended with a score.",
        "charts": charts,
    }


def _table_of_trials(found: Mapping[str, Any], metrics: Sequence[str]) -> dict[str, Any]:
    names = [p["name"] for d in found["space"] for p in d["parameters"]]
    rows = []
    for trial in found["trials"]:
        state = trial["state"]
        if state == "pruned" and trial["rungs"]:
            state = f"stopped after {trial['rungs'][-1]['limit']}"
        if trial["number"] in found["front"] and len(metrics) > 1:
            state = "front"
        state = "best" if trial["number"] == found["best"] else state
        parameters = [_value(trial["parameters"].get(name)) for name in names]
        values = [rounded((trial["values"] or {}).get(metric)) for metric in metrics]
        seconds = [rounded(trial["seconds"].get(key)) for key in ("merge", "evaluate")]
        rows.append([f"trial {trial['number']}", state, *parameters, *values, *seconds])
    columns = ["trial", "state", *names, *metrics, "s to merge", "s to evaluate"]
    return {
        "key": "trials",
        "title": "Trials",
        "text": "",
        "missing": "",
        "charts": [],
        "tables": [{"columns": columns, "rows": rows, "folded": "Every trial with its values"}],
    }


def _failures(found: Mapping[str, Any]) -> dict[str, Any]:
    """Failed trials by what they said, so that forty of one cause are one entry."""
    groups: dict[tuple[str, str], dict[str, Any]] = {}
    for trial in found["trials"]:
        error = trial["error"]
        if trial["state"] != "failed" or error is None:
            continue
        key = (error["kind"], error["message"])
        group = groups.setdefault(key, {**error, "trials": []})
        group["trials"].append(trial["number"])
    return {
        "key": "failures",
        "title": "Failed trials",
        "text": "",
        "missing": "" if groups else "None failed.",
        "charts": [],
        "failures": list(groups.values()),
    }


def _facts(found: Mapping[str, Any]) -> list[list[str]]:
    recipe, tool = found["base_recipe"], found["tool"]
    rows = [[name, _listed(value)] for name, value in recipe.items()]
    goals = ", ".join(f"{m['name']} ({m['goal']})" for m in found["metrics"])
    rows += [["metrics", goals]]
    rows += [["searched by", f"{found['sampler']}, seed {found['seed']}"]]
    if found["rung_limits"]:
        rows.append(["rungs", ", ".join(found["rung_limits"])])
    rows += [["trials", f"{len(found['trials']):,}"]]
    if found["null"]:
        rows.append(["control", "reasoners in random directions"])
    rows += [["evaluated by", str(found["evaluate"])]]
    rows += [["in the end by", str(found["final_evaluate"])]] if found["final_evaluate"] else []
    rows += [["best merge", str(found["output"])]] if found["output"] else []
    return [*rows, ["made with", f"{tool['name']} {tool['version']}"]]


def _listed(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
