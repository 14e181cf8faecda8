"""The page of a training run: loss, cosine, bias ratio and distance by module over the steps.

Read are, in this order: `train.csv` of `drift-prior train`; `trainer_state.json` of transformers'
Trainer, in the directory or in its last checkpoint; `metrics.csv` of Lightning; `metrics.jsonl`
of a loop of one's own, a line {"step": 1, "loss": 0.5, **handle.metrics()} for each step.
"""

import csv
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from math import isfinite
from pathlib import Path
from typing import Any

from drift_merge.errors import CheckpointError, SourceError
from drift_merge.reports.pages.document import Document, rounded

Log = Mapping[str, Any]  # one entry of a history

PANELS = (  # figure, label, unit on the axis
    ("loss", "Loss", "loss of the training data"),
    ("cosine", "Cosine of gradient and delta", "cos(g, delta)"),
    ("bias_ratio", "Strength of the prior", "|bias| / |g|"),
    ("distance", "Way to the reasoner", "0: start, 1: reasoner"),
    ("alpha", "Alpha", "alpha"),
)
_KEY = re.compile(r"(?:train/)?drift/(?:(\w+)/)?(\w+)")
_ALL = "all"
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_MAX_POINTS = 2000


def read_history(path: Path) -> list[Log]:
    """The logged steps of a run, in their order.

    Args:
        path: directory of a run, or one of the files named above.

    Raises:
        SourceError: nothing of the kind is there.
        CheckpointError: a file cannot be read, or logs no step.
    """
    file = path if path.is_file() else _find(path)
    if file is None:
        raise SourceError(
            f"{path} is not a training run: it has no {', '.join(_READERS)}.",
            remedy="In a loop of your own write a line for each step to metrics.jsonl:\n  print("
            'json.dumps({"step": step, "loss": float(loss), **handle.metrics()}), file=log)',
        )
    read = _READERS.get(file.name, _BY_SUFFIX.get(file.suffix))
    if read is None:
        raise SourceError(
            f"{file} is none of {', '.join(_READERS)}.", remedy="Name a run's directory."
        )
    try:
        history = [log for log in read(file.read_text(encoding="utf-8")) if "step" in log]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{file} cannot be read as a log of steps ({error}).", remedy="Is it whole?"
        ) from error
    if not any(_series(history, figure) for figure, *_ in PANELS):
        raise CheckpointError(
            f"{file} logs no loss and nothing of a prior (drift/cosine and the like).",
            remedy="Add handle.metrics() to what your loop logs: drift-prior guide own-trainer",
        )
    return history


def _find(path: Path) -> Path | None:
    folders = [path]
    steps = [(int(m[1]), p) for p in path.glob("checkpoint-*") if (m := _match(p))]
    folders += [folder for _, folder in sorted(steps, reverse=True)[:1]]
    places = [folder / name for name in _READERS for folder in folders]
    return next((place for place in places if place.is_file()), None)


def _match(path: Path) -> re.Match[str] | None:
    return _CHECKPOINT.fullmatch(path.name)


def _from_csv(text: str) -> Iterable[Log]:
    for row in csv.DictReader(text.splitlines()):
        yield {key: float(value) for key, value in row.items() if key and _is_number(value)}


def _is_number(text: object) -> bool:
    try:
        float(str(text))
    except ValueError:
        return False
    return True


def _from_state(text: str) -> Iterable[Log]:
    history: list[Log] = json.loads(text)["log_history"]
    return history


def _from_lines(text: str) -> Iterable[Log]:
    return [json.loads(line) for line in text.splitlines() if line.strip()]


_READERS: dict[str, Callable[[str], Iterable[Log]]] = {
    "train.csv": _from_csv,
    "trainer_state.json": _from_state,
    "metrics.csv": _from_csv,
    "metrics.jsonl": _from_lines,
}
_BY_SUFFIX = {".csv": _from_csv, ".jsonl": _from_lines}


def describe_run(path: Path, history: Sequence[Log], manifest: Mapping[str, Any]) -> Document:
    """What the page of a run shows.

    Args:
        path: of the run.
        history: of `read_history`.
        manifest: its `train.json`; {} where there is none.
    """
    panels = describe_panels(history)
    steps = [int(log["step"]) for log in history]
    plan = manifest.get("plan", {})
    facts = [[key, str(value)] for key, value in plan.items() if value is not None]
    report = manifest.get("report") or {}
    if "coverage" in report:
        facts.append(["coverage", str(report["coverage"]["text"])])
    return {
        "kind": "run",
        "title": f"Training run: {path.resolve().name}",
        "formula": "g' = g - alpha * c * delta, before every step of the optimizer",
        "notes": _sentences(panels, steps),
        "panels": panels,
        "x_label": "optimizer step",
        "facts": facts,
        "commands": [],
    }


def describe_panels(history: Sequence[Log]) -> list[dict[str, Any]]:
    """One panel for each figure: its series by module, `all` first."""
    found = []
    for figure, label, unit in PANELS:
        series = _series(history, figure)
        missing = "" if series else f"The run has logged no {figure.replace('_', ' ')}."
        shown = [{"name": name, "points": _thinned(series[name])} for name in series]
        plain = {"key": figure, "label": label, "unit": unit}
        found.append(plain | {"missing": missing, "series": shown})
    return found


def _series(history: Iterable[Log], figure: str) -> dict[str, list[list[float | None]]]:
    """Points (step, value) by module; NaN and Inf have the value None."""
    found: dict[str, list[list[float | None]]] = {}
    for log in history:
        for key, value in log.items():
            name = _ALL if key in ("loss", "train/loss", "train_loss") else None
            if figure != "loss":
                match = _KEY.fullmatch(key)
                name = (match[1] or _ALL) if match and match[2] == figure else None
            if name is None or not isinstance(value, int | float):
                continue
            shown = rounded(value) if isfinite(value) else None
            found.setdefault(name, []).append([int(log["step"]), shown])
    return dict(sorted(found.items(), key=lambda item: (item[0] != _ALL, item[0])))


def _thinned(points: list[list[float | None]]) -> list[list[float | None]]:
    """At most so many points, the first and the last among them."""
    if len(points) <= _MAX_POINTS:
        return points
    last = len(points) - 1
    return [points[n * last // (_MAX_POINTS - 1)] for n in range(_MAX_POINTS)]


def _sentences(panels: Sequence[Mapping[str, Any]], steps: Sequence[int]) -> list[str]:
    found = [f"Logged: {len(steps):,} entries, steps {min(steps):,} to {max(steps):,}."]
    for panel in panels:
        whole: list[Any] = next((s["points"] for s in panel["series"] if s["name"] == _ALL), [])
        known = [value for _, value in whole if value is not None]
        if len(known) < len(whole):
            found.append(f"{panel['label']}: {len(whole) - len(known):,} values are NaN or Inf.")
        if known and panel["key"] != "alpha":
            found.append(f"{panel['label']}: {known[0]:.4g} at first, {known[-1]:.4g} at last.")
    return found
