"""Sweeps: many recipes that differ in a few numbers, for one pass over their inputs.

    --set weight=0.05:0.5:0.05     from, to (included), step
    --set density=0.1,0.2,0.5      a list
    --set "bands=0:16=0.1;16:64=0.1"     texts, where an option is one
Several `--set` give every combination.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from decimal import Decimal, InvalidOperation

from drift_merge.errors import RecipeError, nearest
from drift_merge.maths.methods.options import OPTIONS
from drift_merge.maths.methods.table import WEIGHTS
from drift_merge.recipes.recipe import Recipe, method_of, method_variant

MAX_OUTPUTS = 100  # a slip in a step would fill the disk

_KINDS = (int, float, str)
Setting = tuple[tuple[str, str], ...]  # (name, value as written) of one output


def parse_settings(texts: Sequence[str]) -> list[Setting]:
    """Every combination of the values of `--set NAME=VALUES`.

    Returns:
        One entry per output, in the order of the values.

    Raises:
        RecipeError: a text cannot be understood, or there are too many combinations.
    """
    columns = [_parse(text) for text in texts]
    names = [name for name, _ in columns]
    if len(set(names)) != len(names):
        raise RecipeError(
            f"--set names {names[0]} twice.", remedy="Give all its values in one --set."
        )
    settings = [tuple(zip(names, row, strict=True)) for row in itertools.product(*_values(columns))]
    if not settings or len(settings) > MAX_OUTPUTS:
        raise RecipeError(
            f"--set gives {len(settings):,} outputs; expected 1 to {MAX_OUTPUTS}.",
            remedy="Give fewer values, or run several sweeps.",
        )
    return settings


def _values(columns: Sequence[tuple[str, list[str]]]) -> list[list[str]]:
    return [values for _, values in columns]


def _parse(text: str) -> tuple[str, list[str]]:
    name, equals, values = text.partition("=")
    name = name.strip().replace("-", "_")
    if not equals or not name or not values.strip():
        raise _invalid(text, "expected NAME=VALUES")
    if name in OPTIONS and OPTIONS[name].kind is str:
        return name, [value.strip() for value in values.split(";")]
    points = values.split(":")
    if len(points) == 1:
        found = [value.strip() for value in values.split(",")]
        if any(not _is_number(value) for value in found):
            raise _invalid(text, "expected numbers")
        return name, found
    if len(points) != 3 or not all(map(_is_number, points)):
        raise _invalid(text, "expected FROM:TO:STEP")
    # Decimal, so that 0.05:0.5:0.05 has ten values and each is what the user would write.
    first, last, step = (Decimal(point.strip()) for point in points)
    if step <= 0 or last < first or (last - first) / step > MAX_OUTPUTS:
        raise _invalid(text, f"expected FROM <= TO, STEP > 0 and at most {MAX_OUTPUTS} values")
    count = int((last - first) / step) + 1
    return name, [format((first + step * i).normalize(), "f") for i in range(count)]


def _is_number(text: str) -> bool:
    try:
        return Decimal(text.strip()).is_finite()
    except InvalidOperation:
        return False


def _invalid(text: str, why: str) -> RecipeError:
    return RecipeError(
        f"--set {text!r} cannot be used: {why}.",
        remedy="Write --set weight=0.05:0.5:0.05 or --set density=0.1,0.2,0.5",
    )


def vary(recipe: Recipe, setting: Mapping[str, str]) -> Recipe:
    """The recipe with some of its numbers replaced.

    Raises:
        RecipeError: the method has no such number, or the value is out of its range.
    """
    row = method_of(recipe)
    numbers = [n for n in row.option_names(method_variant(recipe)) if row.option(n).kind in _KINDS]
    known = [*WEIGHTS, *numbers]
    changed = recipe
    for name, value in setting.items():
        if name not in known:
            raise RecipeError(
                f"--set: {recipe.method} has no number or word {name!r}.{nearest(name, known)}",
                remedy=f"It has: {', '.join(known)}.",
            )
        if name == "weight":
            changed = replace(changed, weights=(float(value),))
        elif name == "mllm_weight":
            changed = replace(changed, mllm_weight=float(value))
        else:
            kind = row.option(name).kind
            found = int(Decimal(value)) if kind is int else kind(value)
            changed = replace(changed, options={**changed.options, name: found})
    return changed


def output_name(setting: Setting) -> str:
    """The directory of an output: weight=0.1, or density=0.2,scale=1.6."""
    return ",".join(f"{name}={value}" for name, value in setting)
