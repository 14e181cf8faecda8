"""Compare two checkpoints of any kind, text or multimodal, without writing a prior."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from drift_merge.errors import AlignmentError
from drift_merge.names.modules import canonical_order
from drift_merge.names.refusals import require_complete
from drift_merge.names.tensors import Finding, identity_parts
from drift_merge.plans.plan import Plan, Step, View, build_plan
from drift_merge.plans.prepare import Prepared, prepare
from drift_merge.plans.prior import PRIOR_METADATA, plan_prior
from drift_merge.plans.views import view_of
from drift_merge.recipes.recipe import Recipe
from drift_merge.recipes.words import PRIOR
from drift_merge.reports.figures import TensorFigures
from drift_merge.reports.outside import OutsidePairs, outside_names, pair_outside, partners_of
from drift_merge.reports.places import LANGUAGE, PARTS
from drift_merge.storage.checkpoint import Checkpoint
from drift_merge.storage.quantized import FLOATS, refuse_quantized

if TYPE_CHECKING:
    from drift_merge.reports.histogram import Histogram
    from drift_merge.reports.measure import MeasureOptions
    from drift_merge.storage.loans.leases import Traffic

EVERYTHING = "full"  # the modules for which what is outside the tower is compared, too
_WITHOUT_TABLES = "re:^(?!embed_tokens|lm_head)"
_USED = ("matched",)


@dataclass(frozen=True, slots=True)
class ComparisonPlan:
    """What will be compared; headers and configs have been read, no tensor."""

    plan: Plan
    places: dict[str, str]  # step name -> part of the model
    prepared: Prepared
    outside: OutsidePairs
    notes: tuple[Finding, ...] = ()

    @property
    def findings(self) -> tuple[Finding, ...]:
        """Lineage; A is called the reasoner there, and B the mllm."""
        return (*self.notes, *self.prepared.findings)

    def coverage(self) -> dict[str, list[str]]:
        """Names by what became of them; those that are compared are the steps of the plan."""
        records = self.prepared.reasoners[0][1].records
        by_status: dict[str, list[str]] = {}
        for record in records:
            by_status.setdefault(record.status, []).append(record.name)
        outside = self.outside
        return {
            "compared": list(self.places),
            "only_a": by_status.get("only_reasoner", []) + list(outside.only_a),
            "only_b": by_status.get("only_mllm", []) + list(outside.only_b),
            "shape_mismatch": by_status.get("shape_mismatch", []) + list(outside.shape_mismatch),
            "not_selected": by_status.get("not_selected", []),
            "no_numbers": list(outside.no_numbers),
        }


@dataclass(frozen=True, slots=True)
class Comparison:
    """What a pass over two checkpoints has found."""

    plan: ComparisonPlan
    tensors: tuple[TensorFigures, ...]  # in the order of a model, the language tower first
    histograms: dict[str, "Histogram"]  # of |delta|, by module or part
    traffic: "Traffic | None"

    @property
    def tower(self) -> tuple[TensorFigures, ...]:
        """The language tower alone."""
        return tuple(t for t in self.tensors if t.part == LANGUAGE)


def plan_comparison(
    a: str,
    b: str,
    *,
    base: str | None = None,
    modules: str = EVERYTHING,
    layers: str | None = None,
    map_file: Path | None = None,
    stream: bool = False,
    quiet: bool = False,
) -> ComparisonPlan:
    """Open and pair two checkpoints.

    Args:
        a: directory, file or Hub id; delta = A - B.
        b: likewise; text or multimodal, like `a`.
        base: common ancestor of both, for the agreement of signs.
        modules: of the language tower, as in `--modules`; only with "full" what is outside it
            is compared, too.
        layers: likewise.
        map_file: of a `--map`; A is its reasoner, B its mllm.
        stream: leave the shards of Hub sources on the Hub until they are read.
        quiet: no progress bars of downloads.

    Raises:
        SourceError, CheckpointError: a source is not there, or broken.
        AlignmentError: no tensor of the two has the same name and shape.
    """
    recipe = Recipe(
        method=PRIOR,
        reasoners=(a,),
        mllm=b,
        base=base,
        modules=modules,
        layers=layers,
        map_file=map_file,
        on_mismatch="skip",
    )
    prepared, notes = _prepare(recipe, stream=stream, quiet=quiet)
    recipe = prepared.recipe
    reasoner, alignment = prepared.reasoners[0]
    require_complete(alignment, on_mismatch="skip")
    outside = OutsidePairs((), (), (), (), ())
    if modules == EVERYTHING and layers is None:
        outside = pair_outside(alignment, reasoner, prepared.mllm)
    steps = _tower_steps(prepared)
    places = dict.fromkeys((step.name for step in steps), LANGUAGE)
    for step in _outside_steps(prepared, outside):
        if step.name in places:  # a stored name that reads like a canonical one
            step = step._replace(name=f"{step.module}: {step.name}")
        steps.append(step)
        places[step.name] = step.module
    plan = build_plan(recipe, _sources(prepared), steps, "compared", PRIOR_METADATA)
    return ComparisonPlan(plan, places, prepared, outside, notes)


def _prepare(recipe: Recipe, *, stream: bool, quiet: bool) -> tuple[Prepared, tuple[Finding, ...]]:
    """Open and align; of everything, leave the tables of tokens out if their rows are unknown."""
    try:
        return prepare(recipe, stream=stream, quiet=quiet, are_peers=True), ()
    except AlignmentError as error:
        if recipe.modules != EVERYTHING:
            raise
        rest = replace(recipe, modules=_WITHOUT_TABLES)
        try:
            prepared = prepare(rest, stream=stream, quiet=quiet, are_peers=True)
        except AlignmentError:
            raise error from None
        message = f"The embedding and the head are not compared: {error.message}"
        return prepared, (Finding("no_rows", "warning", message, error.remedy),)


def _sources(prepared: Prepared) -> tuple[Checkpoint, ...]:
    base = (prepared.base[0],) if prepared.base else ()
    return (prepared.mllm, prepared.reasoners[0][0], *base)


def _tower_steps(prepared: Prepared) -> list[Step]:
    """Steps of the tower, with the base where it has a partner."""
    reasoner, alignment = prepared.reasoners[0]
    used = [record for record in alignment.records if record.status in _USED]
    refuse_quantized(prepared.mllm, [name for record in used for name in record.mllm])
    refuse_quantized(reasoner, [name for record in used for name in record.reasoner])
    plain = plan_prior(prepared.recipe, prepared.mllm, reasoner, alignment)
    if prepared.base is None:
        return [_by_rows(step) for step in plain.steps]
    refuse_quantized(
        prepared.base[0],
        [n for r in prepared.base[1].records if r.status in _USED for n in r.reasoner],
    )
    based = plan_prior(prepared.recipe, prepared.mllm, reasoner, alignment, prepared.base)
    with_base = {step.name: step for step in based.steps}
    return [_by_rows(with_base.get(step.name, step)) for step in plain.steps]


def _outside_steps(prepared: Prepared, outside: OutsidePairs) -> list[Step]:
    reasoner, mllm = prepared.reasoners[0][0], prepared.mllm
    bases = _bases(prepared, outside)
    steps = []
    for pair in outside.pairs:
        inputs = [View(0, identity_parts(pair.mllm, pair.shape)), view_of(1, pair, {}, reasoner)]
        other = bases.get(pair.mllm)
        if other is not None:
            inputs.append(View(2, identity_parts(other, pair.shape)))
        step = Step(
            pair.canonical,
            PRIOR,
            mllm.tensors[pair.mllm].dtype,
            pair.shape,
            tuple(inputs),
            has_base=other is not None,
            module=pair.module,
        )
        steps.append(_by_rows(step))
    return steps


def _bases(prepared: Prepared, outside: OutsidePairs) -> dict[str, str]:
    """Stored name in B -> in the base, of what an MLLM as base has outside its tower, too."""
    if prepared.base is None:
        return {}
    base, alignment = prepared.base
    names = partners_of([pair.mllm for pair in outside.pairs], outside_names(alignment, "reasoner"))
    return {
        pair.mllm: names[pair.mllm]
        for pair in outside.pairs
        if pair.mllm in names
        and base.tensors[names[pair.mllm]].shape == pair.shape
        and base.tensors[names[pair.mllm]].dtype in FLOATS
    }


def _by_rows(step: Step) -> Step:
    """Matrices are read by whole rows, which the stable rank needs."""
    return step._replace(is_row_wise=len(step.shape) == 2)


def run_comparison(
    plan: ComparisonPlan, options: "MeasureOptions", *, with_stable_rank: bool = False
) -> Comparison:
    """Stream both checkpoints once and measure every pair; nothing is written."""
    from drift_merge.reports.measure import measure  # here: it needs torch

    found = measure(plan.plan, plan.places, options, with_stable_rank=with_stable_rank)
    order = sorted(found.tensors.values(), key=_order)
    return Comparison(plan, tuple(order), found.histograms, found.traffic)


def _order(tensor: TensorFigures) -> tuple[int, Sequence[object]]:
    return PARTS.index(tensor.part), canonical_order(tensor.name)


def by_stored_name(comparison: Comparison) -> dict[str, TensorFigures]:
    """What was measured, by the names under which B stores the tensors."""
    figures = {tensor.name: tensor for tensor in comparison.tensors}
    steps = comparison.plan.plan.steps
    return {step.inputs[0].parts[0].name: figures[step.name] for step in steps}
