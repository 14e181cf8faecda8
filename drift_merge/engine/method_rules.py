"""What a recipe of a merge method must satisfy: the rules of the catalog."""

import math
from collections.abc import Callable

from drift_merge.engine.recipe import (
    TIES,
    Recipe,
    is_given,
    known_options,
    method_of,
    method_variant,
    nearest,
    one_of,
)
from drift_merge.errors import RecipeError
from drift_merge.maths.catalog import Method

Rule = tuple[Callable[[float], bool], str]

_NOT_NEGATIVE: Rule = (lambda x: x >= 0, "0 or more")
RANGES: dict[str, Rule] = {
    "density": (lambda x: 0 < x <= 1, "a number in (0, 1]"),
    "gamma": (lambda x: 0 <= x < 1, "a number in [0, 1)"),
    "epsilon": _NOT_NEGATIVE,
    "eps": _NOT_NEGATIVE,
    "tol": _NOT_NEGATIVE,
    "max_iter": (lambda x: x >= 1 and x == int(x), "a whole number, 1 or more"),
}


def check_method(recipe: Recipe) -> None:
    """Check a recipe against the catalog: method, variant, base, number of reasoners, options.

    Raises:
        RecipeError: naming what is wrong and what the method accepts.
    """
    method = method_of(recipe)
    variant = method_variant(recipe)
    one_of("--variant", variant, list(method.variants))
    if method.base == "required" and recipe.base is None:
        raise RecipeError(
            f"{method.name} needs a base: {method.formula}.",
            remedy="Name the common ancestor of reasoner and mllm: --base BASE",
        )
    if method.base == "none" and recipe.base is not None:
        raise RecipeError(
            f"{method.name} takes no base: {method.formula}.",
            remedy="Leave --base out, or choose a method on task vectors: drift-merge methods",
        )
    least, most = method.reasoners
    found = len(recipe.reasoners)
    if found < least or (most is not None and found > most):
        wanted = f"{least}" if most == least else f"{least} or more" if most is None else f"{most}"
        raise RecipeError(
            f"{method.name} takes {wanted} reasoner(s); got {found}.",
            remedy="See what each method takes: drift-merge methods",
        )
    _check_weights(recipe, method, variant)
    known = known_options(method, variant)
    for name in recipe.options:
        if name not in known:
            raise RecipeError(
                f"{method.name} has no option {name!r} in its variant {variant}."
                f"{nearest(name, known)}",
                remedy=f"Its options: {', '.join(known) or 'none'}.",
            )
    for name, value in recipe.options.items():
        _check_value(name, value, method.defaults[variant].get(name, 0.0))
    _check_whole_model(recipe)
    missing = [name for name in method.required.get(variant, ()) if not is_given(recipe, name)]
    if missing:
        flag = missing[0].replace("_", "-")
        raise RecipeError(
            f"{method.name} in its variant {variant} needs {', '.join(missing)}.",
            remedy=f"Give it: --{flag} NUMBER",
        )


def _check_whole_model(recipe: Recipe) -> None:
    """Options that make a method look at the whole model first."""
    one_of("--trim", recipe.trim, ["tensor", "global"])
    if recipe.trim == "global" and recipe.method != TIES:
        raise RecipeError(
            f"{recipe.method} trims per tensor only.", remedy="Leave --trim out, or choose ties."
        )
    frank = [weight.is_frank for weight in recipe.parsed_weights]
    if any(frank) and (recipe.method != "task-arithmetic" or not all(frank)):
        raise RecipeError(
            "--weight frank is for task-arithmetic, once for all reasoners.",
            remedy="Write: drift-merge task-arithmetic ... --base BASE --weight frank",
        )


def _check_weights(recipe: Recipe, method: Method, variant: str) -> None:
    """Refuse weights that the method would not use."""
    taken = {*method.defaults[variant], *method.required.get(variant, ())}
    given = (("weight", bool(recipe.weights)), ("mllm_weight", recipe.mllm_weight is not None))
    for name, is_set in given:
        if is_set and name not in taken:
            raise RecipeError(
                f"{method.name} has no {name.replace('_', '-')} in its variant {variant}.",
                remedy="Leave it out; see what each method takes: drift-merge methods",
            )


def _check_value(name: str, value: float | bool, default: float | bool) -> None:
    """Refuse an option of another kind or out of its range."""
    if isinstance(default, bool):
        if not isinstance(value, bool):
            raise _wrong(name, value, "true or false")
        return
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise _wrong(name, value, "a finite number")
    holds, expected = RANGES.get(name, (lambda _: True, ""))
    if not holds(value):
        raise _wrong(name, value, expected)


def _wrong(name: str, value: object, expected: str) -> RecipeError:
    return RecipeError(
        f"{name} is {value!r}; expected {expected}.",
        remedy=f"Give --{name.replace('_', '-')} such a value, or leave it out for the default.",
    )
