"""Evaluates a merge and the unmerged MLLM alike, the latter once, and compares them."""

import json
import os
import shlex
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from drift_merge.errors import EvaluationError
from drift_merge.evaluation.command import ALL, EvaluationCommand, run_program
from drift_merge.evaluation.intervals import compare
from drift_merge.evaluation.kits import lmms_eval, vlmevalkit
from drift_merge.evaluation.kits.kit import KitOptions, TaskScore
from drift_merge.storage import fingerprints
from drift_merge.storage.checkpoint import Checkpoint

KITS: Mapping[str, Any] = {"lmms-eval": lmms_eval, "vlmevalkit": vlmevalkit}
_FORM = 1  # of what is cached

Found = Mapping[str, TaskScore]  # by task


class Evaluator(Protocol):
    """What evaluates both ends."""

    def described(self) -> dict[str, Any]:
        """Everything that its numbers depend on beside the model."""

    def run(self, checkpoint: Checkpoint, out: Path) -> Found:
        """Evaluate a checkpoint on this disk, with all files below `out`."""


@dataclass(frozen=True, slots=True)
class KitEvaluator:
    """A kit, by its key in `KITS`."""

    kit: str
    options: KitOptions
    timeout_seconds: float | None = None

    def described(self) -> dict[str, Any]:
        """See `Evaluator`."""
        return {"with": self.kit, **self.options.as_data()}

    def run(self, checkpoint: Checkpoint, out: Path) -> Found:
        """See `Evaluator`."""
        started = time.time()
        words = KITS[self.kit].words(_path(checkpoint), checkpoint.config, self.options, out)
        try:
            run_program(words, out, timeout_seconds=self.timeout_seconds, option="--python")
        except EvaluationError as error:
            if "No module named" not in error.message:
                raise
            raise EvaluationError(
                error.message,
                remedy=f"Name an interpreter that has all of {self.kit}: --python PATH",
            ) from error
        found: Found = KITS[self.kit].read(self.options, out, started)
        return found


@dataclass(frozen=True, slots=True)
class CommandEvaluator:
    """A command of the user's; its metrics are the tasks."""

    command: EvaluationCommand
    limit: int | None = None

    def described(self) -> dict[str, Any]:
        """See `Evaluator`."""
        command = self.command
        return {
            "with": command.text,
            "metrics": [f"{p.name}={p.text}" for p in command.metrics],
            "items": [f"{p.name}={p.text}" for p in command.items],
            "limit": self.limit,
        }

    def run(self, checkpoint: Checkpoint, out: Path) -> Found:
        """See `Evaluator`."""
        limit = ALL if self.limit is None else str(self.limit)
        scores = self.command.run(_path(checkpoint), limit=limit, out=out, label="evaluate")
        return {
            name: TaskScore(name, value, scores.items.get(name, {}))
            for name, value in scores.values.items()
        }


def _path(checkpoint: Checkpoint) -> str:
    assert checkpoint.path is not None  # it was opened with its shards
    return str(checkpoint.path.absolute())


def evaluate_both(
    merge: Checkpoint,
    unmerged: Checkpoint,
    evaluator: Evaluator,
    *,
    out: Path,
    cache: Path,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Evaluate both ends and compare them, task by task.

    Args:
        merge: on this disk.
        unmerged: likewise.
        evaluator: of both.
        out: folder for the files that the kit writes.
        cache: folder of the evaluations of unmerged models.
        say: called with a line on what is done.

    Returns:
        Plain data: the settings, and for each task both values and their comparison.

    Raises:
        EvaluationError: one of them cannot be evaluated.
        RecipeError: the kit has no name for the architecture or the data.
    """
    settings = evaluator.described()
    other = _unmerged(unmerged, evaluator, out / "unmerged", cache, say)
    say(f"Evaluating {merge.source.label}")
    own = evaluator.run(merge, _made(out / "merge"))
    results = []
    for task, score in own.items():
        base = other[task]
        if base.metric != score.metric:
            raise EvaluationError(
                f"{task}: the merge has {score.metric}, the unmerged MLLM {base.metric}.",
                remedy=f"Discard what is cached, and evaluate both again: rm -r {cache}",
            )
        paired = compare(score.items, base.items)
        row = {"task": task, "metric": score.metric, "value": score.value, "unmerged": base.value}
        row["difference"] = score.value - base.value
        row["paired"] = None if paired is None else asdict(paired) | {"is_noise": paired.is_noise}
        results.append(row)
    return {"settings": settings, "unmerged": unmerged.source.label, "results": results}


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _unmerged(
    checkpoint: Checkpoint,
    evaluator: Evaluator,
    out: Path,
    cache: Path,
    say: Callable[[str], None],
) -> Found:
    """The evaluation of the unmerged MLLM, made once for these files and these settings."""
    key = fingerprints.of_json(
        [_FORM, fingerprints.of_files(checkpoint), _path(checkpoint), evaluator.described()]
    )
    file = cache / f"{key.partition(':')[2]}.json"
    if file.is_file():
        say(f"Taking the unmerged {checkpoint.source.label} from {file}")
        kept = json.loads(file.read_text(encoding="utf-8"))
        return {task: TaskScore(**score) for task, score in kept.items()}
    say(f"Evaluating the unmerged {checkpoint.source.label}, once")
    found = evaluator.run(checkpoint, _made(out))
    cache.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(f".{os.getpid()}.partial")
    content = {task: asdict(score) for task, score in found.items()}
    partial.write_text(json.dumps(content), encoding="utf-8")
    os.replace(partial, file)
    return found


def shareable(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings without what is nobody else's business: paths of this machine, and keys.

    Of a command the names of its first two words are left, of a kit what shapes its numbers.
    """
    if settings["with"] not in KITS:
        words = shlex.split(settings["with"])[:2]
        shown = " ".join(Path(word).name for word in words if "{" not in word)
        return {"with": shown, "limit": settings["limit"]}
    kept = ("with", "tasks", "limit", "max_tokens", "min_pixels", "max_pixels", "kit_model")
    return {name: settings[name] for name in kept}


def default_cache() -> Path:
    """Where evaluations of unmerged models are kept for this user."""
    home = os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()
    return Path(home) / "drift_merge" / "evaluations"
