"""The charts of a search as plain data: points of trials, and rows of bars, dots and intervals.

A chart of `form` "points" has `points` [x, y, number of the trial]; of `form` "rows" it has
`rows`, each with `dots` [value, number of the trial], or a `bar` from 0, or an interval.
"""

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

from drift_merge.reports.pages.document import rounded
from drift_merge.searches.results import verdict
from drift_merge.searches.selection import MINIMIZE

Trial = Mapping[str, Any]  # as `page` describes it
Chart = dict[str, Any]
_ENDED = ("complete", "front", "best")


def histories(found: Mapping[str, Any], trials: Sequence[Trial]) -> list[Chart]:
    """Each metric over the number of the trial; of a single metric with the best so far."""
    charts = []
    numbers = [trial["number"] for trial in trials]
    for metric in found["metrics"]:
        name = metric["name"]
        points = _points(trials, ("number",), ("values", name), (*_ENDED, "pruned"))
        charts.append(
            _chart(f"history-{name}", name, _goal(metric), "number of the trial", points)
            | {
                "ends": [min(numbers), max(numbers)] if numbers else None,
                "levels": _levels(found, name),
                "steps": _best_so_far(trials, metric) if len(found["metrics"]) == 1 else [],
                "failed": [trial["number"] for trial in trials if trial["mark"] == "failed"],
                "whole": True,
            }
        )
    return charts


def front_charts(found: Mapping[str, Any], trials: Sequence[Trial]) -> list[Chart]:
    """Each pair of metrics against each other."""
    charts = []
    for one, other in combinations(found["metrics"], 2):
        x, y = one["name"], other["name"]
        points = _points(trials, ("values", x), ("values", y), _ENDED)
        if points:
            both = [_reference(found, role, x, y) for role in ("mllm", "default")]
            charts.append(
                _chart(f"front-{x}-{y}", f"{y} against {x}", _goal(other), "", points)
                | {"x_label": f"{x}, {_goal(one)}", "others": [point for point in both if point]}
            )
    return charts


def slices(
    found: Mapping[str, Any], trials: Sequence[Trial], metrics: Sequence[str]
) -> list[Chart]:
    """Each metric over each parameter: points of a number, a row of dots for each choice."""
    goals = {metric["name"]: _goal(metric) for metric in found["metrics"]}
    charts = []
    for parameter in (p for d in found["space"] for p in d["parameters"]):
        for metric in metrics:
            name, key = parameter["name"], f"slice-{parameter['name']}-{metric}"
            points = _points(trials, ("parameters", name), ("values", metric), _ENDED)
            if not points:
                continue
            chart = _chart(key, f"{metric} over {name}", goals[metric], name, points)
            if parameter["kind"] == "choice":
                charts.append(_by_choice(chart, parameter["choices"], metric))
            else:
                ends = [parameter["low"], parameter["high"]]
                is_whole = parameter["kind"] == "int"
                charts.append(chart | {"log": parameter["log"], "ends": ends, "whole": is_whole})
    return charts


def _by_choice(chart: Chart, choices: Sequence[Any], metric: str) -> Chart:
    points = chart.pop("points")
    rows = [
        {"name": str(choice), "dots": [[y, number] for x, y, number in points if x == choice]}
        for choice in choices
    ]
    return chart | {"form": "rows", "rows": rows, "x_label": metric}


def importances(found: Mapping[str, Any]) -> list[Chart]:
    """The share of each parameter, a chart for each metric."""
    return [
        {
            "key": f"importance-{metric}",
            "form": "rows",
            "label": metric,
            "unit": "share, all together 100 %",
            "x_label": "",
            "share": True,
            "rows": [{"name": name, "bar": rounded(value)} for name, value in shares.items()],
        }
        for metric, shares in found["importance"].items()
    ]


def intervals(
    found: Mapping[str, Any], roles: Mapping[str, str], items: Mapping[str, str]
) -> list[Chart]:
    """What the best differs by, a chart for each metric."""
    charts = []
    goals = {metric["name"]: metric["goal"] for metric in found["metrics"]}
    for metric in found["metrics"]:
        rows = []
        for row in found["comparisons"]:
            if row["metric"] != metric["name"]:
                continue
            paired = row["paired"] or {}
            ends: dict[str, Any] = {key: rounded(paired.get(key)) for key in ("low", "high", "p")}
            ends["verdict"] = verdict(row, goals) if paired else None
            name = f"{roles[row['against']]}, {items[row['on']].removesuffix(' items')}"
            rows.append({"name": name, "value": rounded(row["difference"]), **ends})
        if rows:
            label, unit = f"Difference in {metric['name']}", _goal(metric)
            charts.append(
                {"key": f"beside-{metric['name']}", "form": "rows", "label": label, "unit": unit}
                | {"x_label": "best minus other", "rows": rows}
            )
    return charts


def _chart(key: str, label: str, unit: str, x_label: str, points: list[list[Any]]) -> Chart:
    plain = {"key": key, "form": "points", "label": label, "unit": unit, "x_label": x_label}
    return plain | {"points": points, "ends": None, "log": False, "whole": False}


def _points(
    trials: Sequence[Trial], x: Sequence[str], y: Sequence[str], marks: Sequence[str]
) -> list[list[Any]]:
    found = [(_at(t, x), _at(t, y), t["number"]) for t in trials if t["mark"] in marks]
    return [list(point) for point in found if point[0] is not None and point[1] is not None]


def _at(trial: Any, path: Sequence[str]) -> Any:
    for key in path:
        trial = trial.get(key, None) if trial is not None else None
    return trial


def _goal(metric: Mapping[str, Any]) -> str:
    return "lower is better" if metric["goal"] == MINIMIZE else "higher is better"


def _levels(found: Mapping[str, Any], metric: str) -> list[dict[str, Any]]:
    """What the trials are to be seen beside, as lines."""
    names = {"mllm": "unmerged mllm", "default": "default recipe"}
    values = {r: (found["validation"].get(r, {}).get("values") or {}).get(metric) for r in names}
    return [{"name": names[r], "value": rounded(v)} for r, v in values.items() if v is not None]


def _reference(found: Mapping[str, Any], role: str, x: str, y: str) -> list[Any] | None:
    """[x, y, name, mark] of a model that is no trial."""
    values = found["validation"].get(role, {}).get("values")
    name = "unmerged mllm" if role == "mllm" else "default recipe"
    return None if values is None else [rounded(values[x]), rounded(values[y]), name, role]


def _best_so_far(trials: Sequence[Trial], metric: Mapping[str, Any]) -> list[list[float]]:
    better = min if metric["goal"] == MINIMIZE else max
    found: list[list[float]] = []
    for trial in trials:
        if trial["mark"] in _ENDED:
            value = trial["values"][metric["name"]]
            best = better(value, found[-1][1]) if found else value
            found.append([trial["number"], best])
    return found
