"""attach(): hook a prior to a model that is being trained. Handle: apply, report, remove."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from drift_merge.errors import RecipeError
from drift_merge.maths.injection import FORMULA, SIGN, Rule, rule_named
from drift_merge.priors.manifest import Prior
from drift_merge.training.deltas import FileDeltas, combine_weights, open_for_training
from drift_merge.training.hooks import hook_optimizer
from drift_merge.training.inject import Injector, Slots
from drift_merge.training.layouts import layout_for
from drift_merge.training.matching import Coverage, Matching, match
from drift_merge.training.pieces import CPU_CHUNK, DensePiece
from drift_merge.training.schedules import Alpha, Schedule, alphas_of, factor_of

State = dict[str, Any]
AnyPrior = Prior | str | Path


def attach(
    model: nn.Module,
    prior: AnyPrior | Sequence[AnyPrior],
    *,
    alpha: Alpha = 1.0,
    rule: str | Rule = "adaptive_cosine",
    optimizer: Any = None,
    modules: str | Sequence[str] = "attn,mlp",
    layers: str | int | Sequence[int | str] | None = None,
    when: str = "step",
    device: str = "auto",
    strict: bool = True,
    schedule: Schedule = None,
    total_steps: int | None = None,
    weights: Sequence[float] | None = None,
    state: State | None = None,
) -> "Handle":
    """Bias the gradients of a model with a prior, once per optimizer step."""
    priors = [
        open_for_training(one)
        for one in ([prior] if isinstance(prior, Prior | str | Path) else list(prior))
    ]
    source = FileDeltas(priors, combine_weights(len(priors), weights))
    rule_name, function = rule_named(rule)
    matching = match(model, priors[0].shapes, modules=modules, layers=layers, is_strict=strict)
    alphas = alphas_of(alpha, {unit.module for unit in matching.units})
    names = tuple(dict.fromkeys(unit.name for unit in matching.units))
    slot_of = {name: slot for slot, name in enumerate(names)}
    layout = layout_for(model, optimizer)
    module_of = {unit.name: unit.module for unit in matching.units}
    entries = [priors[0].prior.tensors[name] for name in names]
    slots = Slots(
        names=names,
        modules=tuple(module_of[name] for name in names),
        alpha=torch.tensor([alphas[module_of[n]] for n in names], dtype=torch.float64),
        mllm_norm=torch.tensor([e["norm_mllm"] for e in entries], dtype=torch.float64),
        prior_norm=torch.tensor([e["norm_delta"] for e in entries], dtype=torch.float64),
        delta_sq=torch.zeros(len(names), dtype=torch.float64),
        start=torch.zeros(len(names), dtype=torch.float64),
    )
    pieces = [
        DensePiece(u, slot_of[u.name], layout.region(u), layout, source, CPU_CHUNK)
        for u in matching.units
    ]
    injector = Injector(pieces, slots, function)
    injector.measure_start()
    handle = Handle(layout, matching, injector, rule_name, factor_of(schedule, total_steps))
    handle._undo = hook_optimizer(model, optimizer, matching.units, handle._step)
    return handle


class Handle:
    """A prior at work in a training run."""

    def __init__(
        self, layout: Any, matching: Matching, injector: Injector, rule: str, factor: Any
    ) -> None:
        self._layout = layout
        self._matching, self._injector, self._rule, self._factor = matching, injector, rule, factor
        self._undo: Any = None
        self.steps = 0

    @property
    def coverage(self) -> Coverage:
        """What is biased, and what is not."""
        return self._matching.coverage

    def apply(self) -> None:
        """Bias the gradients now: after accumulation, reduction and unscaling, before the step."""
        if self._undo is not None:
            raise RecipeError(
                "this handle is hooked to the optimizer, whose step() applies it.",
                remedy="Do not call apply(), or attach with optimizer=None.",
            )
        self._step(None, None)

    def remove(self) -> None:
        """Go back to plain training."""
        if self._undo is not None:
            self._undo()
            self._undo = None

    def _step(self, scale: float | Tensor | None, found_inf: Tensor | None) -> None:
        scale = self._layout.loss_scale if scale is None else scale
        self._injector.apply(self._factor(self.steps), scale)
        self.steps += 1

    def __repr__(self) -> str:
        return f"<drift_merge {self._rule}: {FORMULA}; {SIGN}; {self.coverage.text()}>"
