"""The page of a search: its trials, what decided about them, and the winner beside the others.

All of it is from `search.json`; Optuna is not needed to look at a search.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from drift_merge.errors import SourceError
from drift_merge.reports.pages.document import Document, rounded
from drift_merge.searches.charts import front_charts, histories, importances, intervals, slices
from drift_merge.searches.commands import commands_of
from drift_merge.searches.results import KIND, RESULT, SCHEMA, remarks, verdict
from drift_merge.storage.manifests import read_record

ROLES = {"mllm": "unmerged mllm", "default": "default recipe", "best": "best"}
ITEMS = {"validation": "validation items", "final": "held-out items"}
_PRIMARY = {"better": "Better than the unmerged mllm", "worse": "Worse than the unmerged mllm"}
_PRIMARY |= {"within noise": "Within noise", "unknown: no items": "Not known whether it is noise"}


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
        "verdict": _verdict(found, metrics),
        "notes": [text for code, text in remarks(found) if code != "failed"],
        "trials": trials,
        "sections": [
            _beside(found, metrics),
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


def _verdict(found: Mapping[str, Any], metrics: Sequence[str]) -> dict[str, Any]:
    """The label, and two sentences: which trial it is, and whether it is more than noise."""
    if found["best"] is None:
        count = len(found["trials"])
        failed = f"All {count:,} trials failed." if count > 1 else "The only trial failed."
        return {
            "label": "No trial has ended with a score",
            "sentences": [failed, "Their errors are below; nothing was made."],
        }
    best = next(t for t in found["trials"] if t["number"] == found["best"])
    values = ", ".join(f"{metric} {best['values'][metric]:.4g}" for metric in metrics)
    settings = ", ".join(f"{n} {_short(v)}" for n, v in best["parameters"].items())
    place = "is the best"
    if len(metrics) > 1:
        front = len(found["front"])
        place = f"is on the knee of a Pareto front of {front:,} trials"
        place = place if front > 1 else "is better in one metric or more, and nowhere worse"
    among = f"Of {len(found['trials']):,} trials" if len(found["trials"]) > 1 else "Of one trial"
    first = f"{among}, trial {found['best']} {place}: {values} ({settings})."
    split = "final" if any(row["on"] == "final" for row in found["comparisons"]) else "validation"
    rows = [r for r in found["comparisons"] if r["against"] == "mllm" and r["on"] == split]
    if not rows:
        return {"label": "The best trial", "sentences": [first, "It was compared with nothing."]}
    goals = {metric["name"]: metric["goal"] for metric in found["metrics"]}
    verdicts = {row["metric"]: verdict(row, goals) for row in rows}
    labels = set(verdicts.values())
    label = ", ".join(f"{metric} {text}" for metric, text in verdicts.items())
    told = "; ".join(f"{r['metric']} {difference(r)}: {verdicts[r['metric']]}" for r in rows)
    return {
        "label": _PRIMARY[labels.pop()]
        if len(labels) == 1
        else f"Against the unmerged mllm: {label}",
        "sentences": [first, f"Against the unmerged mllm on the {ITEMS[split]}: {told}."],
    }


def difference(row: Mapping[str, Any]) -> str:
    """A comparison in short: the difference, with its interval and p where they are known."""
    paired = row["paired"]
    if paired is None:
        return f"{row['difference']:+.4g}"
    text = f"{paired['difference']:+.4g} [{paired['low']:+.3g}, {paired['high']:+.3g}]"
    return text + ("" if paired["p"] is None else f", p = {paired['p']:.3g}")


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _beside(found: Mapping[str, Any], metrics: Sequence[str]) -> dict[str, Any]:
    goals = {metric["name"]: metric["goal"] for metric in found["metrics"]}
    scores = []
    for split, items in ITEMS.items():
        for role, title in ROLES.items():
            one = found[split].get(role, {})
            values = one.get("values")
            shown = title if role != "best" else f"best (trial {found['best']})"
            if values is not None:
                cells = [rounded(values[metric]) for metric in metrics]
                scores.append([shown, items, *cells, one.get("num_items", {}).get(metrics[0])])
            elif one.get("error"):
                message = str(one["error"]["message"]).partition("\n")[0]
                scores.append([f"{shown}: {message}", items, *(None for _ in metrics), None])
    rows = []
    for row in found["comparisons"]:
        paired = row["paired"] or {}
        interval = f"{paired['low']:+.3g} to {paired['high']:+.3g}" if paired else None
        p = paired.get("p")
        won = [None if p is None else f"{p:.3g}", paired.get("wins"), paired.get("losses")]
        name = f"best against the {ROLES[row['against']]}"
        about = [row["metric"], ITEMS[row["on"]], rounded(row["difference"])]
        rows.append([name, *about, interval, *won, verdict(row, goals)])
    text = "Differences are best minus other, over the items that both have answered; the bar is "
    text += "the 95 % interval. Where it holds 0, chance alone explains the difference."
    columns = ["comparison", "metric", "on", "difference", "95 % interval", "p"]
    columns += ["only best right", "only other right", "verdict"]
    return {
        "key": "beside",
        "title": "The best beside the others",
        "text": text if rows else "Measured before the trials.",
        "missing": "" if scores else "Nothing was evaluated.",
        "charts": intervals(found, ROLES, ITEMS),
        "tables": [
            {"columns": ["model", "items", *metrics, "number of items"], "rows": scores},
            *([{"columns": columns, "rows": rows}] if rows else []),
        ],
    }


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
        else "Not known: it takes 4 complete trials that differ in their scores, and a parameter "
        "that all of them have.",
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
