"""What a search may vary: the options of recipes and methods, and the method itself.

    weight=0.01:0.3:log             from, to; on a logarithmic scale
    density=0.1:0.9:0.1             from, to, step
    method=linear,ties              one of these; with | between them they may hold commas
    weight=curve:4:0:0.3            over the layers, through 4 points from 0 to 0.3
    weight=attn={0:0.1},mlp={0:0.3} any text, with a range in each pair of braces
    ties.density=0.1:0.5            for one method only

An option belongs to a trial where its method has it; what a method lacks is left out for it.
"""

import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from drift_merge.errors import RecipeError, nearest
from drift_merge.maths.methods import METHODS
from drift_merge.maths.methods.options import Option
from drift_merge.recipes.recipe import Recipe
from drift_merge.recipes.values import Methods, build_recipe, method_keys
from drift_merge.searches.parameters import Parameter, Piece, parse_pieces

METHOD, VARIANT = "method", "variant"
_SOURCES = ("reasoner", "mllm")
_WEIGHTS = ("weight", "mllm-weight")  # text that may be a number
Values = Mapping[str, Any]  # of the parameters of one trial, by their names
Pick = Callable[[Parameter], Any]


@dataclass(frozen=True, slots=True)
class Dimension:
    """One `--space`: an option, and how its value is put together."""

    option: str  # long name
    method: str  # "": of every method that has the option
    text: str  # as written
    pieces: tuple[Piece, ...]  # text and parameters in turn

    @property
    def parameters(self) -> list[Parameter]:
        """Those of its pieces that vary."""
        return [piece for piece in self.pieces if isinstance(piece, Parameter)]

    def value(self, values: Values) -> Any:
        """The option's value in a trial: a number where it is nothing but one, else text."""
        found = [values[p.name] if isinstance(p, Parameter) else p for p in self.pieces]
        return found[0] if len(found) == 1 else "".join(map(_written, found))


@dataclass(frozen=True, slots=True)
class Space:
    """What is varied, and the options that are not."""

    base: Mapping[str, Any]  # options of the recipe by their long names
    dimensions: tuple[Dimension, ...]
    own: Methods = field(default_factory=dict)

    @property
    def parameters(self) -> list[Parameter]:
        """Everything that may vary."""
        return [p for dimension in self.dimensions for p in dimension.parameters]

    @property
    def methods(self) -> list[str]:
        """The methods that a trial may have."""
        chosen = next((d for d in self.dimensions if d.option == METHOD), None)
        if chosen is None:
            return [str(self.base[METHOD])]
        return [str(choice) for choice in chosen.parameters[0].choices]

    def draw(self, pick: Pick) -> dict[str, Any]:
        """The values of one trial: of those parameters alone that its method has."""
        values: dict[str, Any] = {}
        for option in (METHOD, VARIANT, None):
            given = self._given(values)
            for dimension in self.dimensions:
                is_now = dimension.option == option
                if option is None:
                    is_now = dimension.option not in (METHOD, VARIANT)
                if is_now and self._applies(dimension, given):
                    values |= {p.name: pick(p) for p in dimension.parameters}
        return values

    def corners(self) -> list[dict[str, Any]]:
        """Values to try first: all ends of ranges, and every choice, for each method."""
        wanted: list[dict[str, Any]] = [
            {p.name: p.ends[0] for p in self.parameters},
            {p.name: p.ends[1] for p in self.parameters},
        ]
        wanted += [
            wanted[0] | {p.name: choice} for p in self.parameters for choice in p.choices[1:-1]
        ]
        found: list[dict[str, Any]] = []
        for method, values in itertools.product(self.methods, wanted):
            chosen = values | ({METHOD: method} if METHOD in values else {})
            drawn = self.draw(lambda p, chosen=chosen: chosen[p.name])  # type: ignore[misc]
            if drawn not in found:
                found.append(drawn)
        return found

    def recipe(self, values: Values) -> Recipe:
        """The recipe of a trial.

        Raises:
            RecipeError: these values do not go together.
        """
        return build_recipe(self.options(values), self.own)

    def options(self, values: Values) -> dict[str, Any]:
        """The options of a trial by their long names: the recipe's, with what is varied."""
        given = self._given(values)
        found: dict[str, Any] = {}
        repeated: dict[str, list[Any]] = {}
        for dimension in self.dimensions:
            if all(p.name in values for p in dimension.parameters):
                repeated.setdefault(dimension.option, []).append(dimension.value(values))
        for name, listed in repeated.items():
            found[name] = listed if len(listed) > 1 else listed[0]
        return {**given, **found}

    def _given(self, values: Values) -> dict[str, Any]:
        """The recipe's own options; where methods are varied, those that this one has."""
        given = dict(self.base)
        for dimension in self.dimensions:
            names = [p.name for p in dimension.parameters]
            if dimension.option in (METHOD, VARIANT) and all(n in values for n in names):
                given[dimension.option] = dimension.value(values)
        if not any(dimension.option == METHOD for dimension in self.dimensions):
            return given
        row = self._row(str(given[METHOD]))
        if given.get(VARIANT) not in row.variants:
            given.pop(VARIANT, None)
        if row.base == "none":
            given.pop("base", None)
        taken = (METHOD, *_SOURCES, *self._taken(given))
        return {name: value for name, value in given.items() if name in taken}

    def _applies(self, dimension: Dimension, given: Mapping[str, Any]) -> bool:
        if dimension.method not in ("", given[METHOD]):
            return False
        return dimension.option == METHOD or dimension.option in self._taken(given)

    def _taken(self, given: Mapping[str, Any]) -> dict[str, Option]:
        """The options that a method has in its variant."""
        row = self._row(str(given[METHOD]))
        variant = str(given.get(VARIANT) or row.variants[0])
        found = method_keys(row.name, self.own)
        own = {"weight": "weight", "mllm-weight": "mllm_weight"}
        own |= {row.option(name).long_name: name for name in row.option_names()}
        if row.base == "none":
            found.pop("base", None)
        if variant not in row.variants:
            return found
        return {k: o for k, o in found.items() if k not in own or row.takes(own[k], variant)}

    def _row(self, method: str) -> Any:
        return {**METHODS, **self.own}[method]


def parse_space(base: Mapping[str, Any], texts: Sequence[str], own: Methods | None = None) -> Space:
    """The space of `--space` texts around a recipe.

    Args:
        base: options of the recipe by their long names.
        texts: as above, at least one.
        own: methods of a user's own.

    Raises:
        RecipeError: a text cannot be read, no method has its option, or a value is not one that
            the option takes.
    """
    known = {**METHODS, **(own or {})}
    if not texts:
        raise RecipeError("there is no --space.", remedy="Add one: --space weight=0.01:0.3:log")
    split = [_split(text, known) for text in texts]
    dimensions: list[Dimension] = []
    chosen = [values for _, option, values, _ in split if option == METHOD]
    methods = re.split(r"[|,]", chosen[0]) if chosen else [str(base[METHOD])]
    for name in methods:
        if name.strip() not in known:
            raise RecipeError(
                f"--space method: there is no method {name!r}.{nearest(name, known)}",
                remedy="See them all: drift-merge methods",
            )
    counts: dict[str, int] = {}
    for prefix, option, values, text in split:
        row = _option(prefix, option, [m.strip() for m in methods], own, text)
        counts[f"{prefix}.{option}"] = number = counts.get(f"{prefix}.{option}", 0) + 1
        if number > 1 and not (row is not None and row.is_many):
            raise RecipeError(
                f"--space gives {option} twice.", remedy="Give all its values in one."
            )
        name = ".".join(filter(None, [prefix, option, str(number) if number > 1 else ""]))
        is_number = row is not None and (row.kind in (int, float) or option in _WEIGHTS)
        pieces = parse_pieces(values, name, text, is_number=is_number, option=row)
        dimensions.append(Dimension(option, prefix, text, pieces))
    space = Space(base, tuple(dimensions), own or {})
    _try(space)
    return space


def _split(text: str, known: Mapping[str, Any]) -> tuple[str, str, str, str]:
    """Method or "", option, values, and the text itself."""
    name, equals, values = text.partition("=")
    prefix, dot, option = name.strip().rpartition(".")
    if not equals or not option or not values.strip():
        raise RecipeError(
            f"--space {text!r} cannot be used: expected OPTION=VALUES.",
            remedy="Write --space weight=0.01:0.3:log or --space method=linear,ties",
        )
    if dot and prefix not in known:
        raise RecipeError(
            f"--space {text!r}: there is no method {prefix!r}.{nearest(prefix, known)}",
            remedy="Write METHOD.OPTION=VALUES; see: drift-merge methods",
        )
    return prefix, option.replace("_", "-"), values.strip(), text


def _option(
    prefix: str, option: str, methods: Sequence[str], own: Methods | None, text: str
) -> Option | None:
    """The row of an option that at least one method has; None of the method itself."""
    if option == METHOD:
        return None
    keys: dict[str, Option] = {}
    for name in methods:
        if prefix in ("", name):
            keys |= {k: o for k, o in method_keys(name, own).items() if not o.is_internal}
    if option not in keys:
        where = prefix or ", ".join(methods)
        raise RecipeError(
            f"--space {text!r}: {where} has no option {option}.{nearest(option, keys)}",
            remedy=f"Options that can be varied: method, {', '.join(keys) or 'none'}.",
        )
    return keys[option]


def _try(space: Space) -> None:
    """Make the recipes at the corners of the space, so that none fails later."""
    used: set[str] = set()
    for values in space.corners():
        used |= values.keys()
        try:
            space.recipe(values)
        except RecipeError as error:
            shown = ", ".join(f"{name} {value}" for name, value in values.items())
            raise RecipeError(
                f"--space: with {shown}: {error.message}", remedy=error.remedy
            ) from error
    for dimension in space.dimensions:
        if dimension.parameters and not {p.name for p in dimension.parameters} & used:
            raise RecipeError(
                f"--space {dimension.text!r} has no effect: no method takes the option in its "
                "variant.",
                remedy="Leave it out, or vary the variant too: --space variant=...",
            )
        if not dimension.parameters:
            raise RecipeError(
                f"--space {dimension.text!r} varies nothing.", remedy="Write it into the recipe."
            )


def _written(value: Any) -> str:
    return repr(value) if isinstance(value, float) else str(value)
