"""`search.json`: every trial of a search, its winner, and whether that is more than noise."""

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from drift_merge.evaluation.intervals import compare
from drift_merge.evaluation.scores import Scores
from drift_merge.searches.selection import MINIMIZE
from drift_merge.searches.study import (
    ERROR,
    ITEMS,
    RECIPE,
    REDUCTION,
    SECONDS,
    WORKER,
    Study,
    require_optuna,
)

SCHEMA = 1
KIND = "drift-merge-search"
RESULT, RECIPE_FILE = "search.json", "best.yaml"  # in the folder of a search
_STATES = {"COMPLETE": "complete", "PRUNED": "pruned", "FAIL": "failed", "RUNNING": "running"}
_MIN_TRIALS = 4  # complete ones, for the importance of parameters


def describe_trials(study: Study, metrics: Sequence[str]) -> list[dict[str, Any]]:
    """The trials that count as plain data, by number."""
    rungs = study.settings.rungs
    found = []
    for trial in study.trials():
        notes = trial.user_attrs
        reached = sorted(trial.intermediate_values.items())
        found.append(
            {
                "number": trial.number,
                "state": _STATES[trial.state.name],
                "parameters": dict(trial.params),
                "values": _values(trial, metrics),
                "rungs": [{"limit": rungs[_rung(step)], "value": value} for step, value in reached],
                "recipe": notes.get(RECIPE),
                "seconds": notes.get(SECONDS, {}),
                "error": notes.get(ERROR),
                "worker": notes.get(WORKER, "").partition(":")[0],
                "started": _time(trial.datetime_start),
                "ended": _time(trial.datetime_complete),
            }
        )
    return found


def _values(trial: Any, metrics: Sequence[str]) -> dict[str, float] | None:
    """Of a complete trial; Optuna gives a pruned one the value of its last rung."""
    is_complete = trial.state.name == "COMPLETE"
    return dict(zip(metrics, trial.values, strict=True)) if is_complete else None


def _rung(step: int) -> int:
    rung = 0
    while REDUCTION**rung < step:
        rung += 1
    return rung


def _time(moment: Any) -> str | None:
    return None if moment is None else str(moment.isoformat(timespec="seconds"))


def importance(study: Study, metrics: Sequence[str]) -> dict[str, dict[str, float]]:
    """By metric the share of each parameter in what decides about good trials (PED-ANOVA).

    Empty where there are too few complete trials, or no parameter that all of them have.
    """
    optuna = require_optuna()
    complete = [t for t in study.trials() if t.state.name == "COMPLETE"]
    found: dict[str, dict[str, float]] = {}
    if len(complete) < _MIN_TRIALS:
        return found
    for number, metric in enumerate(metrics):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                found[metric] = optuna.importance.get_param_importances(
                    study.optuna_study,
                    evaluator=optuna.importance.PedAnovaImportanceEvaluator(),
                    target=lambda trial, number=number: trial.values[number],
                )
            except (ValueError, RuntimeError, ImportError):
                continue  # nothing that all trials share, or all have one value
    return found


def as_data(scores: Scores, seconds: float) -> dict[str, Any]:
    """An evaluation as a study keeps it."""
    return {
        "values": dict(scores.values),
        "items": {name: dict(items) for name, items in scores.items.items()},
        "seconds": round(seconds, 3),
    }


def comparisons(
    results: Mapping[str, Mapping[str, Any]], metrics: Sequence[str], split: str
) -> list[dict[str, Any]]:
    """The best merge against the unmerged MLLM and the default recipe, by every metric.

    Args:
        results: "best", "mllm" and "default" -> what `as_data` gave; some may be missing.
        metrics: names.
        split: "validation" or "final".
    """
    found = []
    best = results.get("best", {})
    for against in ("mllm", "default"):
        other = results.get(against, {})
        for metric in metrics:
            if not best.get("values") or not other.get("values"):
                continue
            row: dict[str, Any] = {"of": "best", "against": against, "on": split, "metric": metric}
            row["difference"] = best["values"][metric] - other["values"][metric]
            paired = compare(
                best.get("items", {}).get(metric, {}), other.get("items", {}).get(metric, {})
            )
            row["paired"] = None
            if paired is not None:
                row["paired"] = asdict(paired) | {"is_noise": paired.is_noise}
            found.append(row)
    return found


def verdict(row: Mapping[str, Any], goals: Mapping[str, str]) -> str:
    """What a comparison means, in words."""
    paired = row["paired"]
    if paired is None:
        return "unknown: no items"
    if paired["is_noise"]:
        return "within noise"
    is_better = (paired["difference"] > 0) is not (goals[row["metric"]] == MINIMIZE)
    return "better" if is_better else "worse"


def items_of(trial: Any) -> dict[str, dict[str, float]]:
    """The items of a trial of the study."""
    found: dict[str, dict[str, float]] = json.loads(trial.user_attrs.get(ITEMS, "{}"))
    return found


def remarks(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What is to be kept in mind of a finished search: codes and sentences."""
    rows = []
    if found["null"]:
        rows.append(
            (
                "null",
                "A control: its reasoners point in random directions, so that what it finds is "
                "what such a search finds in noise.",
            )
        )
    failed = [trial for trial in found["trials"] if trial["state"] == "failed"]
    if failed:
        first = failed[0]["error"]["message"].splitlines()[0]
        rows.append(("failed", f"{len(failed)} trial(s) failed, first: {first}"))
    if found["num_interrupted"]:
        rows.append(("again", f"{found['num_interrupted']} interrupted trial(s) were repeated."))
    if found["best"] is None:
        return rows
    if not found["final"]:
        rows.append(
            (
                "validation",
                "The best of many trials is too good on the items that chose it; measure it once "
                "on others with --final.",
            )
        )
    if not any(row["paired"] for row in found["comparisons"]):
        rows.append(
            (
                "items",
                "Without scores of each item nobody can say whether a difference is noise; name "
                "them with --items.",
            )
        )
    return rows
