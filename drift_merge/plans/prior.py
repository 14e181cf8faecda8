"""The plan of a prior: one delta for every matched tensor of the language tower."""

from array import array

from drift_merge.errors import AlignmentError
from drift_merge.names.tensors import Alignment, RowMap
from drift_merge.plans.plan import Plan, Step, View, build_plan
from drift_merge.plans.projections import projections
from drift_merge.plans.views import _mllm_view, is_table, store_as, view_of
from drift_merge.recipes.recipe import Recipe
from drift_merge.storage.checkpoint import Checkpoint

PRIOR_METADATA = {"format": "pt", "kind": "drift-prior", "format_version": "1"}


def plan_prior(
    recipe: Recipe,
    mllm: Checkpoint,
    reasoner: Checkpoint,
    alignment: Alignment,
    base: tuple[Checkpoint, Alignment] | None = None,
) -> Plan:
    """Plan delta = reasoner - mllm (or reasoner - base) over the matched, selected pairs.

    Args:
        recipe: method "prior".
        mllm: the model that delta is computed against.
        reasoner: the text model.
        alignment: of reasoner and mllm, already required to be complete enough.
        base: the base and its alignment with the mllm.

    Raises:
        CheckpointError: a selected tensor is quantized.
    """
    sources = (mllm, reasoner) if base is None else (mllm, reasoner, base[0])
    base_pairs = {pair.canonical: pair for pair in base[1].pairs} if base else {}
    base_rows = base[1].rows if base else {}
    shapes = {pair.canonical: pair.shape for pair in alignment.pairs}
    steps = []
    for pair in alignment.pairs:
        if is_table(pair, mllm, reasoner):
            continue
        inputs = [_mllm_view(pair), view_of(1, pair, alignment.rows, reasoner)]
        if base is not None:
            if pair.canonical not in base_pairs:
                continue
            inputs.append(view_of(2, base_pairs[pair.canonical], base_rows, base[0]))
            inputs[1:] = _share_missing_rows(inputs[1:], pair.shape[0] if pair.shape else 0)
        step = Step(
            pair.canonical,
            "prior",
            mllm.tensors[pair.mllm].dtype,
            pair.shape,
            tuple(inputs),
            has_base=base is not None,
            module=pair.module,
            canonical=pair.canonical,
            matrices=projections(pair.canonical, pair.module, pair.shape, mllm.config, shapes),
        )
        steps.append(store_as(recipe, step))
    if not steps:
        raise AlignmentError(
            "no tensor is matched in the reasoner and in the base alike.",
            remedy="Compare their names with: drift-prior align BASE MLLM --json",
        )
    return build_plan(recipe, sources, steps, "prior", PRIOR_METADATA)


def _share_missing_rows(views: list[View], num_rows: int) -> list[View]:
    """Rows that one of reasoner and base lacks are missing from both, so that their delta is 0."""
    maps = [view.rows for view in views if view.rows is not None]
    if not maps:
        return views
    missing = {i for rows in maps for i, row in enumerate(rows.rows) if row < 0}
    shared = []
    for view in views:
        rows = array("q", view.rows.rows if view.rows else range(num_rows))
        for i in missing:
            rows[i] = -1
        counts = view.rows.num_unexplained if view.rows else 0
        joined = RowMap(rows, num_rows - len(missing), len(missing), False, counts)
        shared.append(View(view.source, view.parts, joined, is_identity=False))
    return shared
