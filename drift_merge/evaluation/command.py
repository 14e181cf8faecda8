"""Runs the program that evaluates a model, and reads its scores.

The command is words, not a shell's line; {model} is the model's directory, {limit} the number of
items, {out} a new folder for its files, {trial} a name. Whatever happens, no process of it is left.
"""

import os
import shlex
import signal
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from drift_merge.errors import EvaluationError, RecipeError
from drift_merge.evaluation.scores import (
    STDOUT,
    Place,
    Scores,
    parse_place,
    read_items,
    read_value,
)
from drift_merge.storage.processes import die_with

ALL = "all"  # the limit that is none
_TAIL_LINES = 12  # of what a failing program said


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationCommand:
    """A program that evaluates, and where it leaves its scores.

    Raises:
        RecipeError: on construction: the command names no {model}, or metrics clash.
    """

    text: str
    metrics: tuple[Place, ...]  # each with a name
    items: tuple[Place, ...] = ()  # each of a metric
    timeout_seconds: float | None = None
    option: str = "--evaluate"  # what it was given as

    def __post_init__(self) -> None:
        if "{model}" not in self.text:
            raise RecipeError(
                f"{self.option} {self.text!r} does not say where the model goes.",
                remedy=f"Write {{model}} in its place: {self.option} "
                f"'{self.text.strip() or 'python evaluate.py'} {{model}}'",
            )
        self._words()

    def _words(self) -> list[str]:
        try:
            return shlex.split(self.text)
        except ValueError as error:
            raise RecipeError(
                f"{self.option} {self.text!r} cannot be read: {error}.",
                remedy="Close every quotation mark.",
            ) from error

    def words(self, model: str, limit: str, out: Path, label: str) -> list[str]:
        """The words of the command for one run.

        A limit of "all" leaves its option out, as `--limit {limit}` or `--limit={limit}`.
        """
        found: list[str] = []
        for word in self._words():
            if "{limit}" in word and limit == ALL:
                if word.startswith("-"):
                    continue
                if word == "{limit}" and found and found[-1].startswith("-"):
                    found.pop()
                    continue
            values = {"{model}": model, "{limit}": limit, "{out}": str(out), "{trial}": label}
            for name, value in values.items():
                word = word.replace(name, value)
            found.append(word)
        return found

    def run(self, model: str, *, limit: str, out: Path, label: str) -> Scores:
        """Evaluate a model.

        Args:
            model: its directory, or its id on the Hub.
            limit: number of items, or "all".
            out: folder for the files of the run; made, with stdout.txt and stderr.txt in it.
            label: for {trial}.

        Raises:
            EvaluationError: it cannot be started, fails, takes too long, or leaves no score.
        """
        out.mkdir(parents=True, exist_ok=True)
        started = time.time()
        stdout = run_program(
            self.words(model, limit, out, label),
            out,
            timeout_seconds=self.timeout_seconds,
            option=self.option,
        )
        folder = out if "{out}" in self.text else Path.cwd()
        values = {p.name: read_value(p, folder, stdout, started) for p in self.metrics}
        items = {p.name: read_items(p, folder, stdout, started) for p in self.items}
        return Scores(values, items)


def run_program(
    words: Sequence[str],
    out: Path,
    *,
    timeout_seconds: float | None = None,
    option: str = "--evaluate",
) -> str:
    """Run a program to its end, with stdout.txt and stderr.txt in `out`; what it printed.

    Raises:
        EvaluationError: it cannot be started, fails or takes too long.
    """
    parent = os.getpid()
    with open(out / "stdout.txt", "wb") as stdout, open(out / "stderr.txt", "wb") as stderr:
        try:
            process = subprocess.Popen(
                words,
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
                start_new_session=True,
                preexec_fn=lambda: die_with(parent),
            )
        except OSError as error:
            raise EvaluationError(
                f"{words[0]} cannot be started: {error.strerror}.",
                remedy=f"Name a program that is installed in {option}.",
            ) from error
        try:
            code = process.wait(timeout_seconds)
        except subprocess.TimeoutExpired as error:
            raise EvaluationError(
                f"the evaluation took more than {timeout_seconds:g} s and was ended.",
                remedy="Allow more with --timeout, or evaluate fewer items.",
            ) from error
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    printed = (out / "stdout.txt").read_text(encoding="utf-8", errors="replace")
    if code:
        said = (out / "stderr.txt").read_text(encoding="utf-8", errors="replace") or printed
        lines = said.strip().splitlines()[-_TAIL_LINES:] or ["it said nothing"]
        raise EvaluationError(
            "\n".join([f"the evaluation failed with exit code {code}: {lines[-1]}", *lines[:-1]]),
            remedy=f"All that it said is in {out}",
        )
    return printed


def command_of(
    text: str,
    metrics: Sequence[str],
    items: Sequence[str] = (),
    *,
    timeout_seconds: float | None = None,
    option: str = "--evaluate",
) -> EvaluationCommand:
    """The command of options as written; without a metric the last number on stdout counts.

    Raises:
        RecipeError: one of them cannot be read, or two metrics have one name.
    """
    places = [parse_metric(metric) for metric in metrics or (STDOUT,)]
    names = [place.name for place in places]
    if len(set(names)) != len(names):
        raise RecipeError(
            f"two metrics are called {names[0]}.", remedy="Name them: --metric NAME=FILE:path"
        )
    return EvaluationCommand(
        text=text,
        metrics=tuple(places),
        items=tuple(_items(item, names) for item in items),
        timeout_seconds=timeout_seconds,
        option=option,
    )


def parse_metric(text: str) -> Place:
    """A metric, with a name."""
    place = parse_place(text, "--metric")
    return Place(place.name or "score", place.file, place.path)


def _items(text: str, metrics: Sequence[str]) -> Place:
    place = parse_place(text, "--items")
    name = place.name or metrics[0]
    if name not in metrics or (not place.name and len(metrics) > 1):
        raise RecipeError(
            f"--items {text} does not say of which metric: {', '.join(metrics)}.",
            remedy=f"Write --items {metrics[0]}={text}",
        )
    return Place(name, place.file, place.path)
