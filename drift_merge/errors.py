"""Every error a user can meet: one class per remedy, each with its exit code.

A message says what, where, got and expected; `remedy` says the way out, as a
command that can be pasted where one exists. The command line prints both and
exits with `exit_code`; Python callers catch the class.
"""

import difflib
from collections.abc import Collection
from functools import partial
from typing import Any


class DriftMergeError(Exception):
    """Base of all errors raised on purpose. `str(error)` is message and remedy together."""

    kind = "internal"  # stable word for `--json`
    exit_code = 70

    def __init__(self, message: str, *, remedy: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.remedy = remedy

    def __reduce__(self) -> tuple[Any, ...]:
        return partial(type(self), remedy=self.remedy), (self.message,)

    def __str__(self) -> str:
        return f"{self.message}\n{self.remedy}" if self.remedy else self.message


class VerificationError(DriftMergeError):
    """A check ran to its end and found a difference."""

    kind = "different"
    exit_code = 1


class RecipeError(DriftMergeError):
    """An option, argument or recipe is not valid."""

    kind = "usage"
    exit_code = 2


class SourceError(DriftMergeError):
    """A source (path or Hub id) cannot be found or reached."""

    kind = "source"
    exit_code = 3


class AlignmentError(DriftMergeError):
    """The two checkpoints cannot be paired as asked."""

    kind = "alignment"
    exit_code = 4


class CheckpointError(DriftMergeError):
    """A checkpoint is corrupt, unsafe to read, or of a kind that cannot be read exactly."""

    kind = "checkpoint"
    exit_code = 5


class OutputError(DriftMergeError):
    """The output cannot be written."""

    kind = "output"
    exit_code = 6


class EvaluationError(DriftMergeError):
    """A program that was to evaluate a model failed, or left no score that can be read."""

    kind = "evaluation"
    exit_code = 7


def nearest(word: str, choices: Collection[str]) -> str:
    """The nearest of `choices` as ` Did you mean X?`, or nothing."""
    close = difflib.get_close_matches(word, list(choices), n=1, cutoff=0.5)
    return f" Did you mean {close[0]}?" if close else ""


def one_of(option: str, value: str, choices: Collection[str], remedy: str = "") -> None:
    """Raise RecipeError unless a value is one of the choices; the nearest is named."""
    if value not in choices:
        raise RecipeError(
            f"{option} is {value!r}; expected one of {', '.join(choices)}.",
            remedy=(remedy or "Choose one of them.") + nearest(value, choices),
        )
