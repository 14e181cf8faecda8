"""alpha: a number, one per module, and how it changes with the steps.

alpha(module, step) = alpha[module] * factor(step)
"""

from collections.abc import Callable, Mapping
from math import cos, isfinite, nan, pi

from drift_merge.errors import RecipeError
from drift_merge.training.options import PUBLISHED, RULE_TRAITS, SCHEDULES, RuleTraits

Alpha = float | str | Mapping[str, float] | None
Schedule = str | Callable[[int], float] | None


def strength_of(alpha: Alpha, name: str, traits: RuleTraits) -> float | Mapping[str, float]:
    """alpha as numbers: None is the rule's default, "published" that of its source.

    Raises:
        RecipeError: another word, or a rule whose source has no value.
    """
    if alpha is None:
        return traits.alpha
    if not isinstance(alpha, str):
        return alpha
    if alpha != PUBLISHED or traits.published is None:
        named = [rule for rule, row in RULE_TRAITS.items() if row.published is not None]
        raise RecipeError(
            f"alpha is {alpha!r} with rule {name}; expected a number, one for each module, or"
            f" {PUBLISHED!r}, which there is for {', '.join(named)}.",
            remedy="Leave alpha out for the rule's default, or give a number: alpha=1.0.",
        )
    return traits.published


def alphas_of(alpha: float | Mapping[str, float], modules: set[str]) -> dict[str, float]:
    """alpha by module.

    Args:
        alpha: one number, or a number for each module of the units.
        modules: those of the units, e.g. {"attn", "mlp"}.

    Raises:
        RecipeError: a module is unknown or missing, or a value is no finite number.
    """
    table = dict(alpha) if isinstance(alpha, Mapping) else dict.fromkeys(modules, alpha)
    wrong = [name for name, value in table.items() if not _is_number(value)]
    if wrong:
        raise RecipeError(f"alpha is {alpha!r}; expected finite numbers.", remedy="E.g. alpha=1.0.")
    if set(table) != modules:
        unknown, missing = sorted(set(table) - modules), sorted(modules - set(table))
        raise RecipeError(
            f"alpha is given for {', '.join(sorted(table))}, but the selected tensors are of"
            f" {', '.join(sorted(modules))}"
            + (f"; not selected: {', '.join(unknown)}" if unknown else "")
            + (f"; missing: {', '.join(missing)}" if missing else "")
            + ".",
            remedy=f"E.g. alpha={dict.fromkeys(sorted(modules), 1.0)}, or one number for all.",
        )
    return {name: float(value) for name, value in table.items()}


def directed(
    alphas: Mapping[str, float], *, negate: bool, is_weighted: bool = False
) -> dict[str, float]:
    """alpha by module, with the sign that was meant.

    Args:
        alphas: of `alphas_of`.
        negate: away from the reasoner.
        is_weighted: a prior has a negative weight, so that signs were thought of.

    Raises:
        RecipeError: an alpha is negative, and nothing says that this is meant.
    """
    if negate:
        return {name: -abs(value) for name, value in alphas.items()}
    negative = [name for name, value in alphas.items() if value < 0]
    if negative and not is_weighted:
        raise RecipeError(
            f"alpha of {negative[0]} is {alphas[negative[0]]:g}: a negative one moves the weights"
            " away from the reasoner.",
            remedy="Give a number >= 0; or, if away is meant, negate=True (--negate), or a negative"
            " weight: attach(model, [prior], weights=[-1.0]).",
        )
    return dict(alphas)


def factor_of(schedule: Schedule, total_steps: int | None) -> Callable[[int], float]:
    """The factor of alpha at a step; step 0 is the first.

    Args:
        schedule: None or "constant": 1. "linear": 1 - t/T. "cosine": (1 + cos(pi t/T)) / 2. Both
            stay 0 from T on. Or a function of the step, whose results must be numbers >= 0.
        total_steps: T, number of optimizer steps.

    Raises:
        RecipeError: an unknown word, or no T where one is needed. (The factor of a function:
            what it returns is NaN, infinite, negative or no number.)
    """
    if callable(schedule):
        return lambda step: _checked(schedule(step), name_of(schedule), step)
    if schedule is None or schedule == "constant":
        return lambda step: 1.0
    if schedule not in SCHEDULES:
        raise RecipeError(
            f"schedule is {schedule!r}; expected one of {', '.join(SCHEDULES)}, or a function.",
            remedy="A function gets the step (0 at first) and returns a factor for alpha.",
        )
    if not isinstance(total_steps, int) or total_steps < 1:
        raise RecipeError(
            f"schedule {schedule!r} needs total_steps, the number of optimizer steps; it is"
            f" {total_steps!r}.",
            remedy=f"E.g. schedule={schedule!r}, total_steps=1000.",
        )
    total = total_steps
    if schedule == "linear":
        return lambda step: max(0.0, 1.0 - step / total)
    return lambda step: (1.0 + cos(pi * min(step / total, 1.0))) / 2.0


def checked_until(until: float | None) -> float | None:
    """The share of the way at which tensors stop.

    Raises:
        RecipeError: it is no finite number above 0.
    """
    if until is not None and (not _is_number(until) or until <= 0):
        raise RecipeError(
            f"until is {until!r}; expected a number above 0: a share of the way to the reasoner.",
            remedy="E.g. until=0.05 for 5 %; leave it out to pull all the time.",
        )
    return None if until is None else float(until)


def name_of(schedule: Schedule) -> str:
    """What a saved state calls a schedule."""
    if callable(schedule):
        return str(getattr(schedule, "__qualname__", type(schedule).__qualname__))
    return schedule or "constant"


def _checked(value: object, name: str, step: int) -> float:
    """What a user's schedule returned; numbers of numpy and torch are fine."""
    try:
        factor = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, RuntimeError):
        factor = nan
    if not isfinite(factor) or factor < 0:
        raise RecipeError(
            f"schedule {name} returned {value!r} for step {step:,}; expected a finite number >= 0.",
            remedy="It is a factor for alpha; to move away from the reasoner: negate=True.",
        )
    return factor


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value)
