"""Scores, and where a program leaves them: a file with a path into its JSON, or its stdout.

    stdout                          the last number that was printed
    stdout:accuracy                 the last line that was printed is a JSON object
    results.json:results.maths."acc,none"
    **/*_results.json:0.score       the newest file that fits; numbers count into lists
    reasoning=scores.json:maths     with a name

Items, for paired intervals: `items.jsonl:right` is one JSON object a line; `all.json:answers` a
list or an object of scores; `all.json:answers.*.right` of objects that hold them.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from drift_merge.errors import EvaluationError, RecipeError

STDOUT = "stdout"
ITEM_IDS = ("id", "doc_id", "question_id", "index", "idx")  # fields that name an item
_NAMED = re.compile(r"([A-Za-z_][\w-]*)=(.+)", re.DOTALL)
_STEP = re.compile(r'"([^"]*)"|([^."]+)')
_NUMBER = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?")


@dataclass(frozen=True, slots=True)
class Scores:
    """What one evaluation found: a number per metric, and where known one per item."""

    values: Mapping[str, float]
    items: Mapping[str, Mapping[str, float]] = field(default_factory=dict)  # by metric, by item


@dataclass(frozen=True, slots=True)
class Place:
    """Where a program leaves something."""

    name: str  # of the metric
    file: str  # "stdout", or a name or glob pattern
    path: tuple[str, ...]  # into the JSON

    @property
    def text(self) -> str:
        """As an error names it."""
        steps = ".".join(f'"{step}"' if "." in step else step for step in self.path)
        return f"{self.file}:{steps}" if steps else self.file


def parse_place(text: str, option: str) -> Place:
    """Parse the value of `--metric` or `--items`.

    Args:
        text: as above.
        option: for messages.

    Raises:
        RecipeError: it is not of that form.
    """
    named = _NAMED.fullmatch(text)
    name, rest = (named[1], named[2]) if named else ("", text)
    file, _, path = rest.partition(":")
    steps = tuple(quoted or plain for quoted, plain in _STEP.findall(path))
    if not file or (path and not steps) or (file != STDOUT and not steps and option == "--metric"):
        raise RecipeError(
            f"{option} {text!r} cannot be used: expected [NAME=]FILE:path.in.json or stdout.",
            remedy=f"Write {option} 'results.json:accuracy', or {option} stdout",
        )
    return Place(name or (steps[-1] if steps and option == "--metric" else ""), file, steps)


def read_value(place: Place, folder: Path, stdout: str, since: float) -> float:
    """The number at a place.

    Args:
        place: of a metric.
        folder: where the program leaves its files.
        stdout: what it printed.
        since: when it was started, in seconds of the epoch: older files are not its.

    Raises:
        EvaluationError: there is none.
    """
    if place.file == STDOUT and not place.path:
        found = _NUMBER.findall(stdout)
        if not found:
            raise EvaluationError(
                "the program printed no number.",
                remedy="Let it print its score last, or name a file: --metric FILE:path.in.json",
            )
        return float(found[-1])
    content = _last_line(stdout) if place.file == STDOUT else _read(place, folder, since)
    return number(_walk(content, place.path, place), place.text)


def read_items(place: Place, folder: Path, stdout: str, since: float) -> dict[str, float]:
    """The score of each item at a place; see `read_value`.

    Raises:
        EvaluationError: there are none, or one is not a number.
    """
    content = _last_line(stdout) if place.file == STDOUT else _read(place, folder, since)
    before: tuple[str, ...] = place.path
    after: tuple[str, ...] = ()
    if "*" in place.path:
        cut = place.path.index("*")
        before, after = place.path[:cut], place.path[cut + 1 :]
    elif isinstance(content, _Lines):
        before, after = (), place.path
    container = _walk(content, before, place)
    if isinstance(container, Mapping):
        pairs = list(container.items())
    elif isinstance(container, list):
        pairs = [(_item_id(item, place_in), item) for place_in, item in enumerate(container)]
    else:
        raise _missing(place, f"is {type(container).__name__}; expected a list or an object")
    found = {name: number(_walk(item, after, place), place.text) for name, item in pairs}
    if len(found) != len(pairs) or not found:
        why = "holds one item twice" if found else "holds no items"
        raise _missing(place, why)
    return found


class _Lines(list[Any]):
    """The objects of a JSONL file."""


def _item_id(item: Any, position: int) -> str:
    if isinstance(item, Mapping):
        for name in ITEM_IDS:
            if isinstance(item.get(name), str | int):
                return str(item[name])
    return str(position)


def number(value: Any, where: str) -> float:
    """A finite number; true and false are 1 and 0.

    Raises:
        EvaluationError: it is none.
    """
    if isinstance(value, int | float) and math.isfinite(value):
        return float(value)
    raise EvaluationError(
        f"{where} is {value!r}; expected a finite number.",
        remedy="Name another entry, or see why the program has no score.",
    )


def _last_line(stdout: str) -> Any:
    lines = [line for line in stdout.splitlines() if line.strip()]
    try:
        return json.loads(lines[-1])
    except (IndexError, ValueError) as error:
        raise EvaluationError(
            "the last line that the program printed is not JSON: "
            f"{(lines[-1] if lines else '')[:80]!r}.",
            remedy="Let it print one JSON object last, or name a file: --metric FILE:path.in.json",
        ) from error


def newest(folder: Path, pattern: str, since: float) -> Path | None:
    """The newest file below a folder that fits a name or pattern and was written since then."""
    is_one = Path(pattern).is_absolute()
    files = [Path(pattern)] if is_one else list(folder.glob(pattern))
    # File systems round times of change, some to a second or two.
    found = [f for f in files if f.is_file() and f.stat().st_mtime >= since - 2.0]
    return max(found, key=lambda file: file.stat().st_mtime, default=None)


def _read(place: Place, folder: Path, since: float) -> Any:
    file = newest(folder, place.file, since)
    if file is None:
        raise EvaluationError(
            f"the program wrote no file {place.file} in {folder}.",
            remedy="Let it write there: {out} in the command is that folder.",
        )
    return read_json(file)


def read_json(file: Path) -> Any:
    """A JSON file, or a JSONL file as a list.

    Raises:
        EvaluationError: it cannot be read.
    """
    try:
        text = file.read_text(encoding="utf-8")
        if file.suffix == ".jsonl":
            return _Lines(json.loads(line) for line in text.splitlines() if line.strip())
        return json.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        raise EvaluationError(
            f"{file} cannot be read as JSON: {error}.", remedy="See what the program writes there."
        ) from error


def _walk(content: Any, path: tuple[str, ...], place: Place) -> Any:
    for step in path:
        if isinstance(content, Mapping) and step in content:
            content = content[step]
        elif isinstance(content, list) and step.lstrip("-").isdigit():
            try:
                content = content[int(step)]
            except IndexError as error:
                raise _missing(place, f"has only {len(content)} entries before {step}") from error
        else:
            known = ", ".join(map(str, list(content)[:8])) if isinstance(content, Mapping) else ""
            raise _missing(place, f"has no {step!r}{f'; it has {known}' if known else ''}")
    return content


def _missing(place: Place, why: str) -> EvaluationError:
    return EvaluationError(
        f"{place.text} {why}.", remedy='Give the path as in results.maths."acc,none".'
    )
