"""Loads a checkpoint in another process, lets it speak, and compares it with the unmerged MLLM."""

import json
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from drift_merge.errors import CheckpointError, EvaluationError
from drift_merge.evaluation.health import CANNOT_SEE, Health, health_of, verdict

_PROBE = Path(__file__).with_name("probe.py")
_PROMPTS = Path(__file__).with_name("prompts")
_TAIL = 6  # lines of what a failing child said


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckOptions:
    """How a checkpoint is checked."""

    python: str  # interpreter with torch and transformers
    device: str = "cpu"
    dtype: str = "auto"
    max_tokens: int = 128


@dataclass(frozen=True, slots=True)
class Checked:
    """What a check has found."""

    verdict: str
    reasons: tuple[str, ...]
    own: Health
    unmerged: Health | None
    answers: tuple[Mapping[str, Any], ...]  # of the checkpoint
    notes: tuple[str, ...]  # what could not be looked at

    def sentence(self) -> str:
        """The verdict in a sentence."""
        if self.reasons:
            return f"{self.verdict}: {'; '.join(self.reasons)}."
        against = " as the unmerged MLLM does" if self.unmerged is not None else ""
        if not self.own.num_answers:
            return f"{self.verdict}: it loads; nothing else was looked at."
        return f"{self.verdict}: it loads and answers {self.own.num_answers} prompts{against}."

    def as_data(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "schema": 1,
            "verdict": self.verdict,
            "sentence": self.sentence(),
            "reasons": list(self.reasons),
            "own": self.own.as_data(),
            "unmerged": None if self.unmerged is None else self.unmerged.as_data(),
            "answers": [
                {name: a[name] for name in ("id", "text", "is_capped", "has_picture")}
                for a in self.answers
            ],
            "not_seen": [*self.notes, CANNOT_SEE],
        }


def check(model: str, unmerged: str | None, options: CheckOptions) -> Checked:
    """Check a checkpoint.

    Args:
        model: directory, or id on the Hub.
        unmerged: the MLLM to compare it with; None: it is looked at alone.
        options: how.

    Raises:
        CheckpointError: transformers cannot load one of them.
        EvaluationError: the interpreter has no transformers.
    """
    own = run_probe(model, options)
    other = None if unmerged is None else run_probe(unmerged, options)
    health, known = health_of(own), None if other is None else health_of(other)
    word, reasons = verdict(health, known)
    notes = list(own["notes"])
    if other is None:
        notes.append("the unmerged MLLM was not looked at: name it with --mllm")
    if health.num_answers and not health.num_pictures:
        notes.append("no prompt with a picture was answered")
    return Checked(word, tuple(reasons), health, known, tuple(own["answers"]), tuple(notes))


def run_probe(model: str, options: CheckOptions) -> dict[str, Any]:
    """What the child reports of one checkpoint; see `check`."""
    prompts = json.loads((_PROMPTS / "prompts.json").read_text(encoding="utf-8"))
    for prompt in prompts:
        if "picture" in prompt:
            prompt["picture"] = str(_PROMPTS / prompt["picture"])
    dtype = options.dtype
    if dtype == "auto" and options.device == "cpu":
        dtype = "float32"  # matrix products in bfloat16 are slow on most CPUs
    with tempfile.TemporaryDirectory(prefix="drift-check-") as folder:
        request, result = Path(folder, "request.json"), Path(folder, "result.json")
        name, _, revision = (model, "", "") if Path(model).exists() else model.partition("@")
        asked = {
            "model": name,
            "revision": revision or None,
            "device": options.device,
            "dtype": dtype,
            "max_tokens": options.max_tokens,
            "text": (_PROMPTS / "text.txt").read_text(encoding="utf-8").strip(),
            "prompts": prompts,
        }
        request.write_text(json.dumps(asked), encoding="utf-8")
        try:
            done = subprocess.run(
                [options.python, str(_PROBE), str(request), str(result)],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                check=False,
            )
        except OSError as error:
            raise EvaluationError(
                f"{options.python} cannot be started: {error.strerror}.",
                remedy="Name a Python interpreter with --python.",
            ) from error
        if done.returncode or not result.is_file():
            raise _failed(model, options, done.stderr, done.returncode)
        found: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
        return found


def _failed(model: str, options: CheckOptions, said: str, code: int) -> Exception:
    lines = said.strip().splitlines()[-_TAIL:] or [f"exit code {code}"]
    for package in ("transformers", "torch", "PIL"):
        if f"No module named '{package}'" in lines[-1]:
            return EvaluationError(
                f"{options.python} has no {package}.",
                remedy="Install it with: pip install 'drift_merge[train]', or name an interpreter "
                "that has it: --python PATH",
            )
    return CheckpointError(
        "\n".join([f"{model} cannot be loaded by transformers: {lines[-1]}", *lines[:-1]]),
        remedy="If the unmerged MLLM loads there, make the merge again; else update transformers.",
    )
