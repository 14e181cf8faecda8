"""A recipe as options by their long names, and back: what YAML files and manifests hold.

Knows nothing of files. `build_recipe(to_values(recipe))` asks for the same bytes as `recipe`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from drift_merge.errors import RecipeError, nearest
from drift_merge.maths.methods import METHODS, Method
from drift_merge.maths.methods.options import OPTIONS, Option
from drift_merge.recipes.options import recipe_options
from drift_merge.recipes.recipe import Recipe, method_of
from drift_merge.recipes.words import PRIOR

RUNNING = (  # how it runs and reports; no byte of the output depends on it
    *("output", "device", "threads", "overwrite", "stream", "cache-limit"),
    *("dry-run", "json", "quiet", "verbose"),
)
_SOURCES = ("method", "reasoner", "mllm")
_LISTS = ("modules", "layers")  # may be lists; joined by commas

Methods = Mapping[str, Method]  # a user's own, by name


def known_keys(own: Methods | None = None) -> list[str]:
    """Every key that a file of ours may have."""
    shared = [option.long_name for option, _ in recipe_options("").values()]
    options = {o.long_name for o in OPTIONS.values()}
    options |= {o.long_name for method in (own or {}).values() for o in method.own_options.values()}
    return [*_SOURCES, *shared, *sorted(options.difference(shared)), *RUNNING]


def method_keys(method: str, own: Methods | None = None) -> dict[str, Option]:
    """The keys that a recipe of this method may have, beside method and sources."""
    found = {}
    row = None if method == PRIOR else _methods(own)[method]
    for name, (option, _) in recipe_options(method).items():
        taken = {"weights": "weight", "mllm_weight": "mllm_weight"}.get(name)
        if taken is None or row is None or any(row.takes(taken, v) for v in row.variants):
            found[option.long_name] = option
    own_options = [row.option(name) for name in row.option_names()] if row else []
    return found | {option.long_name: option for option in own_options}


def _methods(own: Methods | None) -> Methods:
    return {**METHODS, **(own or {})}


def build_recipe(values: Mapping[str, Any], own: Methods | None = None) -> Recipe:
    """The recipe of options by their long names.

    Args:
        values: `method`, `reasoner` (one or a list), `mllm`, and any other option; numbers may be
            numbers or text.
        own: methods of a user's own.

    Raises:
        RecipeError: an option is missing, unknown to the method, or of the wrong kind.
    """
    missing = [key for key in _SOURCES if not values.get(key)]
    if missing:
        raise RecipeError(
            f"{missing[0]} is missing.",
            remedy=f"Add it: {missing[0]}: {'linear' if missing[0] == 'method' else 'org/name'}",
        )
    method = str(values["method"])
    if method != PRIOR and method not in _methods(own):
        raise RecipeError(
            f"method: there is no method {method!r}.{nearest(method, [*_methods(own), PRIOR])}",
            remedy="See them all: drift-merge methods; name a file with your own: --methods FILE",
        )
    known = method_keys(method, own)
    shared = recipe_options(method)
    found: dict[str, Any] = {name: default for name, (_, default) in shared.items()}
    options: dict[str, Any] = {}
    for key, value in values.items():
        if key in _SOURCES:
            continue
        if key not in known:
            raise RecipeError(
                f"{method} has no option {key}.{nearest(key, known)}",
                remedy=f"Its options: {', '.join([*_SOURCES, *known])}.",
            )
        option = known[key]
        target = found if option.name in shared else options
        target[option.name] = _parsed(option, value)
    reasoners = _texts("reasoner", values["reasoner"])
    mllm = _text("mllm", values["mllm"])
    return Recipe(
        method=method,
        reasoners=reasoners,
        mllm=mllm,
        options=options,
        own_method=(own or {}).get(method),
        **found,
    )


def _parsed(option: Option, value: Any) -> Any:
    """A value of a file in the form in which `Recipe` holds it."""
    key = option.long_name
    if option.is_many:
        return _texts(key, value)
    if key in _LISTS and isinstance(value, list | tuple):
        return ",".join(_texts(key, value))
    if option.kind is bool:
        return _flag(key, value)
    if option.kind in (int, float):
        return option.kind(_number(key, value, whole=option.kind is int))
    return option.kind(_text(key, value))


def _texts(key: str, value: Any) -> tuple[str, ...]:
    items = value if isinstance(value, list | tuple) else [value]
    return tuple(_text(key, item) for item in items)


def _text(key: str, value: Any) -> str:
    if isinstance(value, bool | Mapping | list | tuple) or value is None:
        raise RecipeError(
            f"{key} is {value!r}; expected a word or a number.", remedy=f"Write {key}: VALUE"
        )
    return str(value)


def _number(key: str, value: Any, *, whole: bool = False) -> float:
    try:
        return int(_text(key, value)) if whole else float(_text(key, value))
    except ValueError as error:
        raise RecipeError(
            f"{key} is {value!r}; expected a {'whole ' if whole else ''}number.",
            remedy=f"Write {key}: {1 if whole else 0.5}",
        ) from error


def _flag(key: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise RecipeError(
            f"{key} is {value!r}; expected true or false.", remedy=f"Write {key}: true"
        )
    return value


def to_values(recipe: Recipe) -> dict[str, Any]:
    """The options of a recipe by their long names, as plain data: the inverse of `build_recipe`.

    Only what differs from the defaults, after method and sources.
    """
    reasoners = list(recipe.reasoners)
    values: dict[str, Any] = {"method": recipe.method}
    values["reasoner"] = reasoners[0] if len(reasoners) == 1 else reasoners
    values["mllm"] = recipe.mllm
    if recipe.weights:
        weights = list(recipe.weights)
        values["weight"] = weights[0] if len(weights) == 1 else weights
    row = None if recipe.method == PRIOR else method_of(recipe)
    for name, (option, default) in recipe_options(recipe.method).items():
        value = getattr(recipe, name)
        if name == "variant" and row is not None:
            default = row.variants[0]
        if name != "weights" and value is not None and value != default:
            values[option.long_name] = plain(value)
    if row is None:
        return values
    standard = row.defaults[recipe.variant or row.variants[0]]
    given = {name: value for name, value in recipe.options.items() if value != standard.get(name)}
    return values | {row.option(name).long_name: value for name, value in given.items()}


def plain(value: Any) -> Any:
    """A value as YAML and JSON hold it."""
    return str(value) if isinstance(value, Path) else value
