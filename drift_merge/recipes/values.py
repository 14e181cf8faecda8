"""A recipe as options by their long names, and back: what YAML files and manifests hold.

Knows nothing of files. `build_recipe(to_values(recipe))` asks for the same bytes as `recipe`.
"""

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from drift_merge.errors import RecipeError, nearest
from drift_merge.maths.methods import METHODS
from drift_merge.maths.methods.table import known_options
from drift_merge.recipes.recipe import Recipe
from drift_merge.recipes.words import (
    LAYER_SWAP,
    MERGE_MODULES,
    PRIOR,
    PRIOR_MODULES,
    SOURCE_DTYPE,
    TIES,
)

PRIOR_DTYPE = "bfloat16"  # the default output dtype of a prior
RUNNING = (  # how it runs and reports; no byte of the output depends on it
    *("output", "device", "threads", "overwrite", "stream", "cache-limit"),
    *("dry-run", "json", "quiet", "verbose"),
)
_ANY = (
    *("method", "reasoner", "mllm", "base", "modules", "layers", "map", "on-mismatch"),
    *("dtype", "max-shard-size", "allow-nonfinite"),
)
_COMPRESSED = ("through",)  # of a prior alone
_OWN = {LAYER_SWAP: ("keep-layers", "transition"), TIES: ("trim",)}  # of one method alone
_WHOLE = ("seed", "transition")  # whole numbers
_LISTS = ("modules", "layers")  # may be lists; joined by commas
_FIELDS = {"reasoner": "reasoners", "weight": "weights", "map": "map_file"}
_KEYS = {name: key for key, name in _FIELDS.items()}
_BY_ITSELF = ("method", "reasoners", "mllm", "weights", "options")


def known_keys() -> list[str]:
    """Every key that a file of ours may have."""
    names = {name.replace("_", "-") for method in METHODS for name in option_kinds(method)}
    own = [key for keys in _OWN.values() for key in keys]
    weights = ("weight", "mllm-weight")
    return [*_ANY, *_COMPRESSED, *weights, "variant", "seed", *own, *sorted(names), *RUNNING]


def option_kinds(method: str) -> dict[str, type]:
    """The method's own options over all its variants: name -> float or bool."""
    found: dict[str, type] = {}
    entry = METHODS[method]
    for variant in entry.variants:
        for name in known_options(entry, variant):
            default = entry.defaults[variant].get(name, 0.0)
            found[name] = bool if isinstance(default, bool) else float
    return dict(sorted(found.items()))


def method_keys(method: str) -> list[str]:
    """The keys that a recipe of this method may have."""
    if method == PRIOR:
        return [*_ANY, *_COMPRESSED]
    entry = METHODS[method]
    taken = {name for variant in entry.variants for name in entry.defaults[variant]}
    taken |= {name for names in entry.required.values() for name in names}
    own = [name.replace("_", "-") for name in option_kinds(method)]
    weights = [key for key in ("weight", "mllm-weight") if key.replace("-", "_") in taken]
    return [*_ANY, *weights, "variant", "seed", *_OWN.get(method, ()), *own]


def build_recipe(values: Mapping[str, Any]) -> Recipe:
    """The recipe of options by their long names.

    Args:
        values: `method`, `reasoner` (one or a list), `mllm`, and any other option; numbers may be
            numbers or text.

    Raises:
        RecipeError: an option is missing, unknown to the method, or of the wrong kind.
    """
    missing = [key for key in ("method", "reasoner", "mllm") if not values.get(key)]
    if missing:
        raise RecipeError(
            f"{missing[0]} is missing.",
            remedy=f"Add it: {missing[0]}: {'linear' if missing[0] == 'method' else 'org/name'}",
        )
    method = str(values["method"])
    if method != PRIOR and method not in METHODS:
        raise RecipeError(
            f"method: there is no method {method!r}.{nearest(method, [*METHODS, PRIOR])}",
            remedy="See them all: drift-merge methods",
        )
    known = method_keys(method)
    for key in values:
        if key not in known:
            raise RecipeError(
                f"{method} has no option {key}.{nearest(key, known)}",
                remedy=f"Its options: {', '.join(known)}.",
            )
    found: dict[str, Any] = _defaults(method)
    kinds = {} if method == PRIOR else option_kinds(method)
    options: dict[str, Any] = {}
    for key, value in values.items():
        name = key.replace("-", "_")
        if name in kinds:
            options[name] = _flag(key, value) if kinds[name] is bool else _number(key, value)
        else:
            found[_FIELDS.get(key, name)] = _field(key, value)
    return Recipe(**found, options=options)


def _field(key: str, value: Any) -> Any:
    """A value in the form in which `Recipe` holds it."""
    if key in ("reasoner", "weight"):
        items = value if isinstance(value, list | tuple) else [value]
        return tuple(_text(key, item) for item in items)
    if key in _LISTS and isinstance(value, list | tuple):
        return ",".join(_text(key, item) for item in value)
    if key == "allow-nonfinite":
        return _flag(key, value)
    if key in _WHOLE:
        return int(_number(key, value, whole=True))
    text = _text(key, value)
    return Path(text) if key == "map" else text


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
    reasoners, weights = list(recipe.reasoners), list(recipe.weights)
    values: dict[str, Any] = {"method": recipe.method}
    values["reasoner"] = reasoners[0] if len(reasoners) == 1 else reasoners
    values["mllm"] = recipe.mllm
    if weights:
        values["weight"] = weights[0] if len(weights) == 1 else weights
    defaults = {each.name: each.default for each in fields(Recipe)} | _defaults(recipe.method)
    standard: Mapping[str, Any] = {}
    if recipe.method != PRIOR:
        entry = METHODS[recipe.method]
        defaults["variant"] = entry.variants[0]
        standard = entry.defaults[recipe.variant or entry.variants[0]]
    for name, default in defaults.items():
        value = getattr(recipe, name)
        if name not in _BY_ITSELF and value is not None and value != default:
            values[_KEYS.get(name, name.replace("_", "-"))] = plain(value)
    given = {name: value for name, value in recipe.options.items() if value != standard.get(name)}
    return values | {name.replace("_", "-"): value for name, value in given.items()}


def plain(value: Any) -> Any:
    """A value as YAML and JSON hold it."""
    return str(value) if isinstance(value, Path) else value


def _defaults(method: str) -> dict[str, Any]:
    """Defaults that depend on the method."""
    is_prior = method == PRIOR
    return {
        "modules": PRIOR_MODULES if is_prior else MERGE_MODULES,
        "dtype": PRIOR_DTYPE if is_prior else SOURCE_DTYPE,
    }
