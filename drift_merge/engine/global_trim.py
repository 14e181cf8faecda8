"""TIES' trimming over the whole model: two counting walks over all tensors before the merge.

One threshold per task vector, not per tensor, as the paper trims (arXiv 2306.01708, section 3).
"""

from collections.abc import Callable
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from drift_merge.engine.plan import Plan, Step
from drift_merge.engine.reader import Reader, Run
from drift_merge.engine.walks import walk_steps
from drift_merge.errors import RecipeError
from drift_merge.maths.chunks import Settings
from drift_merge.maths.methods import whole_model

SettingsOf = Callable[[Plan, Step], Settings]


def global_trims(run: Run, plan: Plan, settings_of: SettingsOf, *, threads: int) -> Any:
    """The state that `ties` takes in place of its own measure, equal for all tensors.

    Args:
        run: of the stream.
        plan: of a recipe with `trim` "global".
        settings_of: the settings of a step.
        threads: workers.

    Raises:
        RecipeError: tensors are merged from different numbers of models.
    """
    steps = [step for step in plan.steps if step.method == plan.recipe.method]
    if not steps:
        return None
    if len({len(step.weights) for step in steps}) > 1:
        raise RecipeError(
            "--trim global needs every tensor from every reasoner, but some have no partner.",
            remedy="Choose reasoners that match in full, or --trim tensor.",
        )
    settings = settings_of(plan, steps[0])
    numel = sum(plan.layout.tensors[step.name].numel for step in steps)
    rank = whole_model.wanted(numel, settings)
    if rank == 0:
        return whole_model.given([float("nan")] * (1 + len(settings.weights)))

    def total(count: Callable[[Reader], Tensor]) -> Tensor:
        walked = walk_steps(run, plan, steps, lambda s: count(Reader(run, s)), threads=threads)
        return reduce(torch.add, (counts for _, counts in walked))  # whole numbers: in any order

    upper = total(lambda reader: whole_model.upper_counts(reader.walk, settings))
    places = [whole_model.locate(counts, rank) for counts in upper]
    lower = total(lambda reader: whole_model.lower_counts(reader.walk, settings, places))
    found = [
        whole_model.threshold(place, counts) for place, counts in zip(places, lower, strict=True)
    ]
    return whole_model.given(found)
