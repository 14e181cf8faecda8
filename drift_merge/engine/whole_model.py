"""Looks at the whole model before any tensor is made, where an option of the method asks for it.

The walks over the inputs are here; what is counted, and what comes of it, is the method's
(`Survey` in `maths/methods/table.py`).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from drift_merge.engine.context import WorkerContext
from drift_merge.engine.ranks.folding import fold_over_ranks
from drift_merge.engine.reader import Reader, walk_steps
from drift_merge.errors import RecipeError
from drift_merge.maths.chunks import MethodSettings, Read
from drift_merge.maths.methods.table import LAYER, Survey
from drift_merge.names.modules import layer_of
from drift_merge.plans.plan import Plan, Step
from drift_merge.recipes.recipe import active_survey

SettingsOf = Callable[[Plan, Step], MethodSettings]


@dataclass(frozen=True, slots=True)
class Surveyed:
    """What a survey found, by group of tensors."""

    survey: Survey
    found: Mapping[str, Any]

    def weights_of(self, step: Step) -> tuple[float, ...] | None:
        """The measured weights of a step: the mllm's first; None where weights are given."""
        return self._of(step) if self.survey.gives_weights else None

    def settings_of(self, step: Step, settings: MethodSettings) -> MethodSettings:
        """The settings with the measured weights, if they are measured."""
        if (weights := self.weights_of(step)) is None:
            return settings
        return replace(settings, mllm_weight=weights[0], weights=tuple(weights[1:]))

    def state_of(self, step: Step) -> Any:
        """What `combine` takes in place of the method's own measure; None where it measures."""
        return None if self.survey.gives_weights else self._of(step)

    def _of(self, step: Step) -> Any:
        return self.found.get(_group(self.survey, step))  # None of an empty tensor


def survey(
    run: WorkerContext, plan: Plan, settings_of: SettingsOf, *, threads: int
) -> Surveyed | None:
    """Walk over the inputs as often as the method needs; None if it needs no such look.

    Args:
        run: of the stream.
        plan: of a recipe.
        settings_of: the settings of a step.
        threads: workers.

    Raises:
        RecipeError: tensors of one group are merged from different numbers of models.
    """
    wanted = active_survey(plan.recipe)
    steps = plan.parameters
    if wanted is None or not steps:
        return None
    numel: dict[str, int] = {}
    models: dict[str, int] = {}
    for step in steps:
        group = _group(wanted, step)
        numel[group] = numel.get(group, 0) + plan.layout.tensors[step.name].numel
        if models.setdefault(group, len(step.weights)) != len(step.weights):
            raise RecipeError(
                f"--{wanted.option} {wanted.value} needs every tensor of {group} from every "
                "reasoner, but some have no partner.",
                remedy=f"Choose reasoners that match in full, or another --{wanted.option}.",
            )

    keys = [step.name for step in steps]
    groups = {step.name: _group(wanted, step) for step in steps}
    own = [step for step in steps if run.is_own(step.name)]

    def total(count: Callable[[Read], Tensor]) -> dict[str, Tensor]:
        walked = walk_steps(
            run, plan, own, lambda step: count(Reader(run, step).walk), threads=threads
        )
        found = {step.name: counts for step, counts in walked}
        return fold_over_ranks(run.ranks, keys, groups, found, run.device)

    found = wanted.function(total, numel, settings_of(plan, steps[0]))
    return Surveyed(wanted, found)


def _group(wanted: Survey, step: Step) -> str:
    if not wanted.by_layer:
        return "the model"
    layer = layer_of(step.canonical)
    return step.module if layer is None else f"{LAYER}{layer}"
