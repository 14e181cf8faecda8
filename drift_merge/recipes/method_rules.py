"""What a request must obey to be one of a merge method: variant, base, reasoners, options."""

from collections.abc import Collection, Mapping, Sequence

from drift_merge.errors import RecipeError, nearest
from drift_merge.maths.methods import METHODS, Method
from drift_merge.maths.methods.table import SPECTRAL, WEIGHTS, Value
from drift_merge.recipes.weights import Weight

_SEE = "drift-merge methods"


def check_method(
    method: Method,
    variant: str,
    *,
    base: str | None,
    num_reasoners: int,
    options: Mapping[str, Value],
    weights: Sequence[Weight],
    given: Collection[str],
) -> None:
    """Check a request against the row of its method.

    Args:
        method: the row.
        variant: of it.
        base: source of the common ancestor, if there is one.
        num_reasoners: how many there are.
        options: as given.
        weights: of the reasoners, parsed.
        given: which of "weight" and "mllm_weight" the user gave.

    Raises:
        RecipeError: naming what is wrong and what the method accepts.
    """
    _check_inputs(method, base, num_reasoners)
    for name in given:
        if not method.takes(name, variant):
            raise RecipeError(
                f"{method.name} has no {name.replace('_', '-')} in its variant {variant}.",
                remedy=f"Leave it out; see what each method takes: {_SEE}",
            )
    _check_measured(method, [weight.text for weight in weights if weight.is_measured], weights)
    for name, value in options.items():
        _check_option(method, variant, name)
        method.option(name).check(value)
    _check_step(method, options)
    _check_companions(options, weights)
    required = method.required.get(variant, ())
    missing = [name for name in required if name not in (*given, *options)]
    if missing:
        flag = missing[0].replace("_", "-")
        raise RecipeError(
            f"{method.name} in its variant {variant} needs {', '.join(missing)}.",
            remedy=f"Give it: --{flag} NUMBER",
        )


def _check_inputs(method: Method, base: str | None, num_reasoners: int) -> None:
    if method.base == "required" and base is None:
        raise RecipeError(
            f"{method.name} needs a base: {method.formula}.",
            remedy="Name the common ancestor of reasoner and mllm: --base BASE",
        )
    if method.base == "none" and base is not None:
        raise RecipeError(
            f"{method.name} takes no base: {method.formula}.",
            remedy=f"Leave --base out, or choose a method on task vectors: {_SEE}",
        )
    least, most = method.reasoners
    if num_reasoners < least or (most is not None and num_reasoners > most):
        wanted = f"{least}" if most == least else f"{least} or more" if most is None else f"{most}"
        raise RecipeError(
            f"{method.name} takes {wanted} reasoner(s); got {num_reasoners}.",
            remedy=f"See what each method takes: {_SEE}",
        )


def _check_option(method: Method, variant: str, name: str) -> None:
    """Refuse an option that the variant does not take; say which variant does."""
    if method.takes(name, variant) and name not in WEIGHTS:
        return
    known = method.option_names(variant)
    having = [other for other in method.variants if name in method.option_names(other)]
    remedy = f"Its options: {', '.join(known) or 'none'}."
    if having:
        remedy = f"Leave it out, or add: --variant {having[0]}"
    raise RecipeError(
        f"{method.name} has no option {name!r} in its variant {variant}.{nearest(name, known)}",
        remedy=remedy,
    )


def _check_step(method: Method, options: Mapping[str, Value]) -> None:
    """Refuse two choices of singular directions, and a norm that nothing is matched to."""
    asked = [n for n in SPECTRAL if n != "norm" and options.get(n, SPECTRAL[n]) != SPECTRAL[n]]
    if len(asked) > 1:
        raise RecipeError(
            f"--{asked[0]} and --{asked[1]} both choose the singular directions.",
            remedy="Leave one of them out.",
        )
    chosen = asked or [n for n in ("rank", "eta") if _default_of(method, n)]
    if "norm" in options and chosen not in (["rank"], ["eta"]):
        raise RecipeError(
            f"--norm {options['norm']} has no effect: it is for the directions that --rank or "
            "--eta keep.",
            remedy="Add one, such as --rank 1, or leave --norm out.",
        )


def _check_companions(options: Mapping[str, Value], weights: Sequence[Weight]) -> None:
    """Refuse a decay that nothing decays by, and an alpha of no calibration."""
    if options.get("frank_decay") and {weight.text for weight in weights} != {"frank"}:
        raise RecipeError(
            "--frank-decay has no effect without --weight frank.",
            remedy="Add --weight frank, or leave --frank-decay out.",
        )
    if "calibrate_alpha" in options and options.get("calibrate", "none") == "none":
        raise RecipeError(
            "--calibrate-alpha has no effect without --calibrate svc.",
            remedy="Add --calibrate svc, or leave --calibrate-alpha out.",
        )


def _default_of(method: Method, name: str) -> Value:
    return next(iter(method.defaults.values())).get(name, 0)


def _check_measured(method: Method, words: Sequence[str], weights: Sequence[Weight]) -> None:
    """Refuse a word for measured weights where the method measures none, or beside numbers."""
    for word in words:
        if word in _measured(method) and len({weight.text for weight in weights}) == 1:
            continue
        having = next(m.name for m in METHODS.values() if word in _measured(m))
        raise RecipeError(
            f"--weight {word} is for {having}, once for all reasoners.",
            remedy=f"Write: drift-merge {having} ... --base BASE --weight {word}",
        )


def _measured(method: Method) -> list[str]:
    return [survey.value for survey in method.surveys if survey.option == "weight"]
