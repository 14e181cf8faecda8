"""FRANK's weights: closed form, one per layer, from the norms of the task vectors.

    lambda_t = ||tau_t||^2 / sum over all models of ||tau||^2       per layer

for task arithmetic, base + sum(lambda_t * tau_t), the mllm's own task vector among them. The
paper's attention-guided prior (equations 14 to 16) needs images and is not applied.

Source: FRANK, arXiv 2505.16151, section 3.2, equation 13.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from drift_merge.engine.context import WorkerContext
from drift_merge.engine.reader import Reader, walk_steps
from drift_merge.errors import RecipeError
from drift_merge.maths.chunks import MethodSettings, blocks
from drift_merge.maths.methods import global_trimming
from drift_merge.names.modules import layer_of
from drift_merge.plans.plan import Plan, Step

SettingsOf = Callable[[Plan, Step], MethodSettings]


@dataclass(frozen=True, slots=True)
class FrankWeights:
    """The weights of every group of tensors: the mllm's first, then the reasoners'."""

    by_group: Mapping[str, tuple[float, ...]]

    def of(self, step: Step) -> tuple[float, ...]:
        """The weights of the group of a step."""
        return self.by_group[_group(step)]


def frank_weights(run: WorkerContext, plan: Plan, *, threads: int) -> FrankWeights:
    """Measure the task vectors of every layer in one walk over the inputs.

    Tensors outside the layers (embedding, final norm, head) are groups of their own.

    Raises:
        RecipeError: tensors of one layer are merged from different numbers of models.
    """
    steps = [step for step in plan.steps if step.method == plan.recipe.method]
    walked = walk_steps(run, plan, steps, lambda step: _squared_norms(run, step), threads=threads)
    found = {step.name: squared for step, squared in walked}
    sums: dict[str, list[float]] = {}
    for step in steps:  # in the order of the plan: sums of float64 depend on it
        squared = found[step.name]
        total = sums.setdefault(_group(step), [0.0] * len(squared))
        if len(total) != len(squared):
            raise RecipeError(
                f"--weight frank needs every tensor of {_group(step)} from every reasoner.",
                remedy="Choose reasoners that match in full, or give weights as numbers.",
            )
        sums[_group(step)] = [a + b for a, b in zip(total, squared, strict=True)]
    return FrankWeights({group: _shares(total) for group, total in sums.items()})


def _shares(squared: list[float]) -> tuple[float, ...]:
    total = sum(squared)
    if total == 0.0:
        return tuple(1.0 / len(squared) for _ in squared)  # no model has moved: nothing to share
    return tuple(value / total for value in squared)


def _group(step: Step) -> str:
    layer = layer_of(step.canonical)
    return step.module if layer is None else f"layer {layer}"


def _squared_norms(run: WorkerContext, step: Step) -> list[float]:
    """The squared L2 norms of tau_m, tau_1, ..., float32 within a block and float64 across."""
    totals = [0.0] * (1 + len(step.weights))
    for chunk in blocks(Reader(run, step).walk):
        assert chunk.base is not None
        for index, theta in enumerate([chunk.mllm, *chunk.reasoners]):
            tau = theta.sub_(chunk.base)
            totals[index] += float(torch.dot(tau, tau))
    return totals


def global_trims(run: WorkerContext, plan: Plan, settings_of: SettingsOf, *, threads: int) -> Any:
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
    rank = global_trimming.wanted(numel, settings)
    if rank == 0:
        return global_trimming.given([float("nan")] * (1 + len(settings.weights)))

    def total(count: Callable[[Reader], Tensor]) -> Tensor:
        walked = walk_steps(run, plan, steps, lambda s: count(Reader(run, s)), threads=threads)
        return reduce(torch.add, (counts for _, counts in walked))  # whole numbers: in any order

    upper = total(lambda reader: global_trimming.upper_counts(reader.walk, settings))
    places = [global_trimming.locate(counts, rank) for counts in upper]
    lower = total(lambda reader: global_trimming.lower_counts(reader.walk, settings, places))
    found = [
        global_trimming.threshold(place, counts)
        for place, counts in zip(places, lower, strict=True)
    ]
    return global_trimming.given(found)
