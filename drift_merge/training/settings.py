"""How a handle was asked to work, and what of it is saved with a run."""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from drift_merge.errors import RecipeError
from drift_merge.maths.injection import Rule
from drift_merge.storage import fingerprints
from drift_merge.training.options import STORED

STATE_VERSION = 1
State = dict[str, Any]


@dataclass(frozen=True, slots=True)
class InjectionSettings:
    """The arguments of attach(), checked."""

    rule: str
    function: Rule
    alphas: Mapping[str, float]  # by module
    factor: Callable[[int], float]  # of alpha, by step
    schedule: str  # its name
    total_steps: int | None
    when: str  # one of WHEN
    device: str  # one of options.DEVICES
    is_strict: bool
    weights: tuple[float, ...]  # one per prior
    seals: tuple[str, ...]  # of the priors' manifests, in the same order
    command: str  # how a prior for other weights is computed
    uses: str = STORED  # of delta, see options.RuleTraits
    until: float | None = None  # share of the way at which a tensor is not pulled any more
    control: str | None = None  # what stands in delta's place
    by_value: Mapping[str, str] = field(default_factory=dict)
    # canonical name -> name in memory, of pairs that were told by weights which training changes


def describe_state(
    settings: InjectionSettings,
    names: tuple[str, ...],
    *,
    steps: int,
    start: list[float] | None,
    refreshed_at: int | None,
) -> State:
    """What a resumed run needs, as plain data that JSON can hold."""
    return {
        "format_version": STATE_VERSION,
        "steps": steps,
        "priors": list(settings.seals),
        "tensors": fingerprints.of_json(list(names)),
        "start": start,
        "refreshed_at": refreshed_at,
        "by_value": dict(settings.by_value),
        **_fixed(settings),
    }


def check_state(
    state: Mapping[str, Any], settings: InjectionSettings, names: tuple[str, ...]
) -> None:
    """Refuse a state of another run.

    Raises:
        RecipeError: of another prior or selection; with other settings, unless not strict.
    """
    if state.get("format_version") != STATE_VERSION:
        raise RecipeError(
            f"the state has format version {state.get('format_version')!r}; expected"
            f" {STATE_VERSION}.",
            remedy="Pass what state_dict() of a handle returned.",
        )
    if list(state["priors"]) != list(settings.seals):
        raise RecipeError(
            f"the state is of another prior: saved with {', '.join(state['priors'])}, attached is"
            f" {', '.join(settings.seals)}.",
            remedy="Resume with the prior that the run began with.",
        )
    if state["tensors"] != fingerprints.of_json(list(names)):
        raise RecipeError(
            "the state is of another selection of tensors.",
            remedy="Resume with the same modules and layers.",
        )
    if state["refreshed_at"] is not None:
        _complain(
            f"the run had refreshed its delta at step {state['refreshed_at']:,}; this state does"
            " not hold it, so that the run cannot go on exactly.",
            settings,
        )
    fixed = _fixed(settings)
    # Older states have neither `until` nor `control`: their runs had none.
    changed = [key for key in fixed if state.get(key) != fixed[key]]
    if changed:
        texts = (f"{key} was {state.get(key)!r}, is {fixed[key]!r}" for key in changed)
        _complain(f"the run was begun with other settings: {'; '.join(texts)}.", settings)


def _fixed(settings: InjectionSettings) -> dict[str, Any]:
    return {
        "rule": settings.rule,
        "alpha": dict(settings.alphas),
        "schedule": settings.schedule,
        "total_steps": settings.total_steps,
        "when": settings.when,
        "weights": list(settings.weights),
        "until": settings.until,
        "control": settings.control,
    }


def _complain(message: str, settings: InjectionSettings) -> None:
    if settings.is_strict:
        raise RecipeError(message, remedy="Pass strict=False to go on all the same.")
    warnings.warn(message, stacklevel=4)
