"""The plan of a merged checkpoint: every tensor of the mllm, copied or combined.

Weights are resolved here, one number per tensor and reasoner, so that `--dry-run -v` and the
manifest show what will be used.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from drift_merge.errors import RecipeError
from drift_merge.names.modules import parse_layers
from drift_merge.names.tensors import Alignment, Pair, identity_parts
from drift_merge.plans.gates import require_gates
from drift_merge.plans.plan import Plan, Step, View, build_plan, matrices_of
from drift_merge.plans.views import is_table, output_dtype, view_of
from drift_merge.recipes.directions import takes_matrices
from drift_merge.recipes.recipe import (
    Recipe,
    method_of,
    method_options,
    method_variant,
)
from drift_merge.recipes.weights import Weight
from drift_merge.storage.checkpoint import Checkpoint
from drift_merge.storage.headers import TensorInfo

Aligned = tuple[Checkpoint, Alignment]


class _Entry(NamedTuple):
    """One reasoner's data for one tensor of the mllm."""

    view: View
    weight: float
    pair: Pair


def plan_merge(
    recipe: Recipe, mllm: Checkpoint, reasoners: Sequence[Aligned], base: Aligned | None = None
) -> Plan:
    """Plan a merged checkpoint: the mllm's tensors, the matched ones of its tower combined.

    Args:
        recipe: method is the name of a merge method.
        mllm: gives every name, shape and dtype of the output.
        reasoners: each with its alignment with the mllm, already required to be complete enough.
        base: the base and its alignment with the mllm.

    Raises:
        CheckpointError: a selected tensor is quantized.
        RecipeError: no term of a weight covers a selected tensor.
    """
    found = _find_entries(recipe, mllm, reasoners)
    bases = {}
    if base is not None:
        number = len(reasoners) + 1
        bases = {p.mllm: view_of(number, p, base[1].rows, base[0]) for p in base[1].pairs}
    num_layers = reasoners[0][1].mllm.num_layers
    first_of = first_names(reasoners)
    others = [*reasoners, *([base] if base else [])]
    alike = dict(set.intersection(*(set(a.alike.items()) for _, a in others)))
    terms = _Terms.of(recipe)
    steps = []
    for info in mllm.tensors.values():
        first = first_of.get(info.name, info.name)
        step = _step(terms, info, found.get(first, []), bases.get(first), num_layers)
        masked_as = alike.get(step.canonical, "")
        if step.weights and (masked_as or first != info.name):
            second_name_of = first if first != info.name else ""
            step = step._replace(masked_as=masked_as, second_name_of=second_name_of)
        steps.append(step)
    sources = [mllm, *(checkpoint for checkpoint, _ in reasoners)]
    sources += [base[0]] if base else []
    plan = build_plan(recipe, tuple(sources), steps, "model", {"format": "pt"})
    _require_matrices(plan)
    require_gates(plan)
    return plan


def _require_matrices(plan: Plan) -> None:
    """Refuse a spectral step that no tensor of the merge would take.

    Raises:
        RecipeError: nothing that is selected holds a matrix.
    """
    steps = plan.parameters
    wanted = takes_matrices(method_of(plan.recipe), method_options(plan.recipe))
    if wanted and steps and not any(matrices_of(plan, step) for step in steps):
        raise RecipeError(
            f"none of the {len(steps):,} tensors selected holds a projection matrix, whose "
            f"singular directions {plan.recipe.method} is asked for.",
            remedy="Select attention or MLP: --modules attn,mlp",
        )


def first_names(reasoners: Sequence[Aligned]) -> dict[str, str]:
    """Second stored name of a parameter of the mllm -> the name that is paired."""
    return {
        other: first
        for _, alignment in reasoners
        for first, others in alignment.second_names.items()
        for other in others
    }


def _find_entries(
    recipe: Recipe, mllm: Checkpoint, reasoners: Sequence[Aligned]
) -> dict[str, list[_Entry]]:
    """What the reasoners have for each tensor of the mllm, by its stored name; no tables."""
    found: dict[str, list[_Entry]] = {}
    weighted = zip(reasoners, recipe.parsed_weights, strict=True)
    for source, ((checkpoint, alignment), weight) in enumerate(weighted, start=1):
        constant = weight.constant
        swapped = _layer_factors(recipe, alignment.mllm.num_layers)
        for pair in alignment.pairs:
            if is_table(pair, mllm, checkpoint):
                continue
            value = constant
            if value is None:
                value = _resolve(weight, pair, alignment.mllm.num_layers)
            value *= 1.0 if pair.layer is None else swapped.get(pair.layer, 1.0)
            view = view_of(source, pair, alignment.rows, checkpoint)
            found.setdefault(pair.mllm, []).append(_Entry(view, value, pair))
    return found


def _resolve(weight: Weight, pair: Pair, num_layers: int) -> float:
    return weight.resolve(pair.canonical, pair.module, pair.layer, num_layers)


def _layer_factors(recipe: Recipe, num_layers: int) -> dict[int, float]:
    """For layer-swap: 0 in kept layers, 1/2 in transition layers beside them, by layer."""
    options = method_options(recipe)
    if "keep_layers" not in options:
        return {}
    kept = parse_layers(str(options["keep_layers"]), num_layers)
    transition = int(options["transition"])
    factors = dict.fromkeys(kept, 0.0)
    for layer in range(num_layers):
        near = any(abs(layer - other) <= transition for other in kept)
        if near and layer not in kept:
            factors[layer] = 0.5
    return factors


@dataclass(frozen=True, slots=True)
class _Terms:
    """What all steps of a recipe share: found once, since a plan can have 100,000 of them."""

    recipe: Recipe
    mllm_weight: Weight
    adds_nothing_at_zero: bool
    adds_nothing: bool  # whatever the weights
    least_reasoners: int
    divides: bool  # by the sum of the weights
    is_row_wise: bool

    @classmethod
    def of(cls, recipe: Recipe) -> "_Terms":
        """Of a recipe."""
        method, options = method_of(recipe), method_options(recipe)
        at_zero = method.adds_to_mllm and method_variant(recipe) == "paper"
        divides = options.get("normalize") and method.takes("weight", method_variant(recipe))
        return cls(
            recipe,
            recipe.parsed_mllm_weight,
            adds_nothing_at_zero=at_zero,
            adds_nothing=at_zero and options.get("scale", 1.0) == 0.0,
            least_reasoners=method.reasoners[0],
            # On task vectors a sum of zero divides by 1: the base stays, as in mergekit.
            divides=bool(divides) and method.base != "required",
            is_row_wise=method.row_wise,
        )


def _step(
    terms: _Terms,
    info: TensorInfo,
    entries: list[_Entry],
    base: View | None,
    num_layers: int,
) -> Step:
    recipe = terms.recipe
    dtype = output_dtype(recipe, info.dtype, info.name)
    own = View(0, identity_parts(info.name, info.shape))
    active = [e for e in entries if e.weight != 0.0] if terms.adds_nothing_at_zero else entries
    is_bare = recipe.base is not None and base is None
    if len(active) < max(1, terms.least_reasoners) or terms.adds_nothing or is_bare:
        method = "copy" if dtype == info.dtype else "cast"
        return Step(info.name, method, dtype, info.shape, (own,))
    pair = active[0].pair
    mllm_weight = _resolve(terms.mllm_weight, pair, num_layers)
    if terms.divides:
        _check_sum(recipe, [mllm_weight, *(entry.weight for entry in active)], info.name)
    inputs = (own, *(entry.view for entry in active), *([base] if base is not None else []))
    return Step(
        info.name,
        recipe.method,
        dtype,
        info.shape,
        inputs,
        weights=tuple(entry.weight for entry in active),
        mllm_weight=mllm_weight,
        has_base=base is not None,
        module=pair.module,
        canonical=pair.canonical,
        is_row_wise=terms.is_row_wise,
    )


def _check_sum(recipe: Recipe, weights: list[float], name: str) -> None:
    """Refuse weights that a method would divide by their sum of zero."""
    if sum(weights) == 0.0:
        raise RecipeError(
            f"the weights of {name} sum to zero, and {recipe.method} divides by their sum.",
            remedy="Change a weight, or add --no-normalize.",
        )
