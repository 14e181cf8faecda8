"""One number or choice that a search varies, and how it is written.

LOW:HIGH, LOW:HIGH:log, LOW:HIGH:STEP     a number; whole where the option is
A,B,C or A|B|C                            one of these
curve:N:LOW:HIGH[:log]                    N numbers, as the list [..., ...]
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from drift_merge.errors import RecipeError
from drift_merge.maths.methods.options import Option

_HOLE = re.compile(r"\{([^{}]*)\}")
_WORDS = {"true": True, "false": False}
MAX_POINTS = 64  # of a curve


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameter:
    """What one draw decides."""

    name: str
    kind: str  # "float", "int" or "choice"
    low: float = 0.0
    high: float = 0.0
    is_log: bool = False
    step: float | None = None
    choices: tuple[Any, ...] = ()

    @property
    def ends(self) -> tuple[Any, Any]:
        """The first and the last value."""
        if self.kind == "choice":
            return self.choices[0], self.choices[-1]
        return (int(self.low), int(self.high)) if self.kind == "int" else (self.low, self.high)

    def points(self, count: int) -> list[Any]:
        """Its values, for a grid: all where they can be counted, else `count` of even distance."""
        if self.kind == "choice":
            return list(self.choices)
        if self.step is None and self.kind == "int" and not self.is_log:
            return list(range(int(self.low), int(self.high) + 1))
        if self.step is not None:
            total = int((self.high - self.low) / self.step + 1e-9) + 1
            found = [self.low + self.step * i for i in range(total)]
        else:
            low, high = (math.log(v) if self.is_log else v for v in (self.low, self.high))
            spread = [low + (high - low) * i / max(1, count - 1) for i in range(count)]
            found = [math.exp(v) if self.is_log else v for v in spread]
            found = [min(max(v, self.low), self.high) for v in found]
        rounded = [round(v, 12) for v in found]
        return sorted({round(v) for v in rounded}) if self.kind == "int" else rounded

    def as_data(self) -> dict[str, Any]:
        """For `search.json`."""
        if self.kind == "choice":
            return {"name": self.name, "kind": self.kind, "choices": list(self.choices)}
        ends = {"low": self.ends[0], "high": self.ends[1], "log": self.is_log, "step": self.step}
        return {"name": self.name, "kind": self.kind, **ends}


Piece: TypeAlias = str | Parameter


def parse_pieces(
    values: str, name: str, whole: str, *, is_number: bool, option: Option | None
) -> tuple[Piece, ...]:
    """The pieces of one space: fixed text and parameters in turn.

    Args:
        values: what stands behind the "=".
        name: of its parameters; several are told apart by a number.
        whole: the text that was given, for messages.
        is_number: whether a bare LOW:HIGH is a range (or text, as layers 0:28 are).
        option: the option that is varied; None for the method.

    Raises:
        RecipeError: something in it cannot be read.
    """
    kind = option.kind if option is not None else str
    if "{" not in values and not is_number:
        return (_choice(values, name, whole, kind),)
    kind = float if is_number and kind is str else kind  # a weight: a number, or text
    holes = _HOLE.split(values) if "{" in values else ["", values, ""]
    if any("{" in text or "}" in text for text in holes[::2]):
        raise _invalid(whole, "a brace has no partner")
    pieces: list[Piece] = []
    for index, text in enumerate(holes):
        if index % 2 == 0:
            pieces += [text] if text else []
        elif text.startswith("curve:"):
            pieces += _curve(text, whole)
        else:
            pieces.append(_parameter(text, whole, kind))
    return _named(pieces, name)


def _named(pieces: Sequence[Piece], name: str) -> tuple[Piece, ...]:
    """The same with a name for each parameter: the option's, and a number if there are several."""
    count = sum(isinstance(piece, Parameter) for piece in pieces)
    found: list[Piece] = []
    number = 0
    for piece in pieces:
        if isinstance(piece, str):
            found.append(piece)
            continue
        values = {n: getattr(piece, n) for n in Parameter.__slots__}
        values["name"] = name if count == 1 else f"{name}[{number}]"
        found.append(Parameter(**values))
        number += 1
    return tuple(found)


def _curve(text: str, whole: str) -> list[Piece]:
    parts = text.split(":")
    count = int(parts[1]) if len(parts) > 3 and parts[1].isdigit() else 0
    if not 2 <= count <= MAX_POINTS:
        raise _invalid(whole, f"expected curve:N:LOW:HIGH with N of 2 to {MAX_POINTS}")
    one = _parameter(":".join(parts[2:]), whole, float)
    listed: list[Piece] = [one]
    for _ in range(count - 1):
        listed += [",", one]
    return ["[", *listed, "]"]


def _parameter(text: str, whole: str, kind: type) -> Parameter:
    if ":" not in text:
        return _choice(text, "", whole, kind)
    low, high, *more = (part.strip() for part in text.split(":"))
    is_log = more == ["log"]
    numbers = [_number(part, whole) for part in (low, high, *([] if is_log else more))]
    if len(numbers) not in (2, 3) or numbers[0] >= numbers[1]:
        raise _invalid(whole, "expected LOW:HIGH, LOW:HIGH:log or LOW:HIGH:STEP with LOW < HIGH")
    step = numbers[2] if len(numbers) == 3 else None
    if is_log and numbers[0] <= 0:
        raise _invalid(whole, "a logarithmic range begins above 0")
    if step is not None and not 0 < step <= numbers[1] - numbers[0]:
        raise _invalid(whole, "the step is larger than the range, or not above 0")
    if kind is int and any(n != int(n) for n in numbers):
        raise _invalid(whole, "the option is a whole number")
    if step is not None:  # the last value is one of the steps
        numbers[1] = numbers[0] + step * int((numbers[1] - numbers[0]) / step + 1e-9)
    return Parameter(
        name="",
        kind="int" if kind is int else "float",
        low=numbers[0],
        high=round(numbers[1], 12),
        is_log=is_log,
        step=step,
    )


def _choice(text: str, name: str, whole: str, kind: type) -> Parameter:
    listed = [word.strip() for word in text.split("|" if "|" in text else ",")]
    if not all(listed) or len(set(listed)) != len(listed):
        raise _invalid(whole, "a value is empty, or given twice")
    if kind is bool and not all(word in _WORDS for word in listed):
        raise _invalid(whole, "expected true,false")
    choices: list[Any] = [_WORDS[w] if kind is bool else _plain(w, kind, whole) for w in listed]
    return Parameter(name=name, kind="choice", choices=tuple(choices))


def _plain(word: str, kind: type, whole: str) -> Any:
    """A choice as the option holds it; a weight may be a number or text."""
    if kind in (int, float):
        if (kind is float and any(c in word for c in "=[")) or word.isalpha():
            return word  # of a weight: attn=0.1, or a word that measures it
        found = _number(word, whole)
        if kind is int and found != int(found):
            raise _invalid(whole, "the option is a whole number")
        return int(found) if kind is int else found
    return word


def _number(text: str, whole: str) -> float:
    try:
        found = float(text)
    except ValueError as error:
        raise _invalid(whole, f"{text!r} is no number") from error
    if not math.isfinite(found):
        raise _invalid(whole, f"{text!r} is not finite")
    return found


def _invalid(text: str, why: str) -> RecipeError:
    return RecipeError(
        f"--space {text!r} cannot be used: {why}.",
        remedy="Write --space weight=0.01:0.3:log, density=0.1:0.9:0.1, method=linear,ties or "
        "weight=curve:4:0:0.3",
    )
