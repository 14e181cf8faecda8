"""attach(): put a prior to work on a model that is being trained."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from drift_merge.errors import one_of
from drift_merge.maths.injection import Rule, rule_named
from drift_merge.names.name_map import SideMap, read_name_map
from drift_merge.priors.manifest import Prior
from drift_merge.training.deltas.controls import read_control
from drift_merge.training.deltas.files import FileDeltas
from drift_merge.training.deltas.opened import OpenPrior, combine_weights, controlled, open_all
from drift_merge.training.gradient_bias import GradientBias
from drift_merge.training.gradients.choose import layout_for
from drift_merge.training.gradients.hooks import steppers_of
from drift_merge.training.gradients.layout import PlainLayout
from drift_merge.training.gradients.microbatch import require_hookable
from drift_merge.training.handle import Handle
from drift_merge.training.match.lines import Hints
from drift_merge.training.match.live import checkpoint_of
from drift_merge.training.match.matching import joined, match
from drift_merge.training.options import DEVICES, OWN_RULE, RULE_TRAITS, WHEN
from drift_merge.training.schedules import (
    Alpha,
    Schedule,
    alphas_of,
    checked_until,
    directed,
    factor_of,
    name_of,
    strength_of,
)
from drift_merge.training.settings import InjectionSettings

AnyPrior = Prior | str | Path


def attach(
    model: nn.Module,
    prior: AnyPrior | Sequence[AnyPrior],
    *,
    alpha: Alpha = None,
    negate: bool = False,
    rule: str | Rule = "adaptive_cosine",
    optimizer: Any = None,
    until: float | None = None,
    control: str | None = None,
    modules: str | Sequence[str] = "attn,mlp",
    layers: str | int | Sequence[int | str] | None = None,
    when: str = "step",
    device: str = "auto",
    strict: bool = True,
    schedule: Schedule = None,
    total_steps: int | None = None,
    weights: Sequence[float] | None = None,
    state: Mapping[str, Any] | None = None,
    map_file: str | Path | None = None,
    tower: str | None = None,
) -> Handle:
    """Bias a model's gradients with a prior: g' = g - alpha * coefficient * delta.

    Descent along g' moves the weights along +delta, towards the reasoner. Call it after the
    model was wrapped or sharded (DDP, fully_shard, deepspeed.initialize, PEFT).

    Args:
        model: the model that is trained, wrapped or not.
        prior: a `Prior`, its directory or Hub id, or a list of these.
        alpha: strength, >= 0 to move towards the reasoner; or one for each module:
            {"attn": 1.0, "mlp": 0.5}. None for the rule's default, at which the data keep their
            say (`options.RULE_TRAITS`); "published" for that of the rule's source.
        negate: move away from the reasoner; alpha may then have either sign.
        rule: a key of `maths.injection.RULES`, or a function from `Sums` to coefficients:
            "absolute" (g - alpha * delta), "absolute_param_norm" (delta rescaled to |theta_mllm|,
            as the reference code has it), "gradnorm" (delta rescaled to |g|), "adaptive_cosine"
            (the paper's: times (1 + cos(g, delta)) / 2), "sign" (where g does not oppose delta),
            "anchor" (g - alpha * (theta_reasoner - theta_t); every rank keeps the weights that its
            run began with, 2 or 4 bytes an element; not with adapters).
        optimizer: its step() is hooked: torch's, accelerate's, DeepSpeed's engine, or a list of
            several, each of which biases what it holds. With None call `handle.apply()` before
            each step, after unscaling. A step that is made without a bias is an error then.
        until: 0.05 stops pulling every tensor that has come 5 % of its way, as long as it has.
        control: "random:SEED" or "permuted:SEED": in place of delta one of equal norms that knows
            nothing of the reasoner, to compare with.
        modules: "attn,mlp" as on the command line, or a sequence of such words.
        layers: "0:28" or numbers; None for all.
        when: "step", once per optimizer step; or "microbatch", in every backward pass as the
            reference code, about sqrt(micro-batches * ranks) times stronger. For comparison.
        device: where delta waits: "auto", "cpu" or "cuda".
        strict: refuse partial coverage, other weights than the prior's and changed settings;
            otherwise warn.
        schedule: of alpha: None, "constant", "cosine", "linear", or a function of the step.
        total_steps: optimizer steps, for "cosine" and "linear".
        weights: of several priors: delta = sum of weight * delta; 1 each by default.
        state: `state_dict()` of the run that is resumed; the weights are then refused if they
            are still those that the run began with.
        map_file: YAML of name patterns as for `--map`; its mllm side may name tensors on the disk
            or in memory.
        tower: prefix in memory of the language tower, such as "model.decoder", where there are
            several; by default the one whose names, shapes and values are the prior's.

    Returns:
        The handle; keep it.

    Raises:
        AlignmentError: prior and model do not match; nothing to train; quantized weights.
        VerificationError: the weights are not those that the prior was computed against. (Where
            gradients are sharded: at the first step.)
        RecipeError: an argument or the map is not valid; the optimizer is of another model; the
            rule cannot work on this layout.

    Source: DRIFT, arXiv 2510.15050.
    """
    one_of("when", when, WHEN, "'step' is once per optimizer step, 'microbatch' in every backward.")
    one_of("device", device, DEVICES, "It says where delta waits; 'auto' goes by what is free.")
    name, function = rule_named(rule)
    traits = RULE_TRAITS.get(name, OWN_RULE) if isinstance(rule, str) else OWN_RULE
    found = open_all([prior] if isinstance(prior, AnyPrior) else list(prior))
    priors = controlled(found, read_control(control))
    files = FileDeltas(priors, combine_weights(len(priors), weights))
    matching = match(
        model,
        priors[0].shapes,
        label=str(priors[0].prior.path),
        modules=modules,
        layers=layers,
        is_strict=strict,
        command=priors[0].command(modules=joined(modules)),
        hints=Hints(
            entries=priors[0].prior.tensors,
            name_map=SideMap() if map_file is None else read_name_map(map_file).mllm,
            tower=tower,
            computed=_asked(priors[0]),
            by_value=dict(state.get("by_value", {})) if state is not None else {},
        ),
    )
    settings = InjectionSettings(
        rule=name,
        function=function,
        alphas=directed(
            alphas_of(strength_of(alpha, name, traits), {unit.module for unit in matching.units}),
            negate=negate,
            is_weighted=min(files.weights) < 0,
        ),
        factor=factor_of(schedule, total_steps),
        schedule=name_of(schedule),
        total_steps=total_steps if isinstance(schedule, str) else None,
        when=when,
        device=device,
        is_strict=strict,
        weights=files.weights,
        seals=tuple(opened.seal for opened in priors),
        command=priors[0].command(mllm=checkpoint_of(model)),
        by_value=matching.by_value,
        uses=traits.uses,
        until=checked_until(until),
        control=control,
    )
    layout = layout_for(model, optimizer)
    if when == "microbatch":
        require_hookable(matching.units, layout)
        layout = PlainLayout()
    steppers = steppers_of(model, optimizer, matching.trained)
    bias = GradientBias(settings, matching, layout, files, steppers)
    handle = Handle(settings, matching, bias, steppers)
    if state is not None:
        handle.load_state_dict(state)
    try:
        handle.begin(model, layout)
    except BaseException:
        handle.remove()
        raise
    return handle


def _asked(opened: OpenPrior) -> tuple[str, str | None]:
    """The modules and layers that a prior was computed for."""
    parameters = opened.prior.manifest["parameters"]
    return str(parameters["modules"]), parameters["layers"]
