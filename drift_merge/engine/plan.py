"""The plan: for every output tensor where it comes from, by which formula, and where it goes.

Plain data, made from headers alone: no torch, no tensor data. `--dry-run` prints it, the
stream executes it, and its fingerprint says whether an unfinished run may be resumed.
"""

from array import array
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Any

from drift_merge.engine.preflight import FLOATS, require_plain
from drift_merge.engine.recipe import DTYPES, SOURCE_DTYPE, Recipe
from drift_merge.errors import AlignmentError
from drift_merge.names.tensors import Alignment, Pair, Part, RowMap, identity_parts
from drift_merge.storage import fingerprints
from drift_merge.storage.checkpoint import Adapter, Checkpoint
from drift_merge.storage.compressed import (
    CODES,
    COMPRESSED,
    SCALE_DTYPE,
    SCALE_SUFFIX,
    scale_name,
    stored_as,
)
from drift_merge.storage.headers import TensorInfo, tensor_bytes
from drift_merge.storage.shards import Layout, lay_out

TOOL = f"drift_merge {version('drift_merge')}"
PRIOR_METADATA = {"format": "pt", "kind": "drift-prior", "format_version": "1"}


@dataclass(frozen=True, slots=True)
class View:
    """The data of one source, seen in the shape of the output tensor."""

    source: int  # index into Plan.sources
    parts: tuple[Part, ...]
    rows: RowMap | None = None  # rows gathered by token, for embeddings of other vocabularies
    is_identity: bool = True  # one stored tensor, taken as it lies
    adapter: Adapter | None = None  # LoRA factors to add, in the compute dtype
    scale: str = ""  # stored name of the scales of its rows, where it is compressed


@dataclass(frozen=True, slots=True)
class Step:
    """One output tensor. `inputs[0]` is the mllm's; then the reasoners', then the base's."""

    name: str  # in the output
    method: str  # "copy", "cast", "prior", or a merge method
    dtype: str  # of the output
    shape: tuple[int, ...]
    inputs: tuple[View, ...]
    weights: tuple[float, ...] = ()  # one per reasoner among the inputs
    mllm_weight: float = 1.0  # of the mllm's own task vector, for methods on a base
    has_base: bool = False  # the last input is the base
    module: str = "other"  # attn, mlp, norm, embed, head, other
    canonical: str = ""  # canonical name; empty outside the tower
    scale: str = ""  # output name of the scales of its rows, where it is compressed
    through: str = ""  # dtype that the result is rounded to before it is compressed


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything that will happen. `sources[0]` is the mllm."""

    recipe: Recipe
    sources: tuple[Checkpoint, ...]
    steps: tuple[Step, ...]  # in the order of the output files
    layout: Layout

    def info(self, part: Part, source: int) -> TensorInfo:
        """The stored tensor that a part of a view names."""
        return self.sources[source].tensors[part.name]

    @property
    def read_bytes(self) -> int:
        """Bytes of tensor data that will be read, each view once."""
        views = [view for step in self.steps for view in step.inputs]
        scales = [self.sources[view.source].tensors[view.scale] for view in views if view.scale]
        return sum(info.size_bytes for info in scales) + sum(
            tensor_bytes(self.info(part, view.source).dtype, (part.rows, part.cols))
            for view in views
            for part in view.parts
        )

    @property
    def write_bytes(self) -> int:
        """Bytes of tensor data that will be written."""
        return sum(info.size_bytes for info in self.layout.tensors.values())

    def counts(self) -> dict[str, int]:
        """Number of output tensors by method."""
        return dict(sorted(Counter(step.method for step in self.steps).items()))

    def fingerprint(self) -> str:
        """What must be equal for a resumed run: inputs on disk, formulas, layout, version."""
        return fingerprints.of_json(
            [
                TOOL,
                self.recipe.parameters(),
                [fingerprints.of_files(source) for source in self.sources],
                [fingerprints.of_bytes(shard.header) for shard in self.layout.shards],
                [_step_key(step) for step in self.steps],
            ]
        )


def _step_key(step: Step) -> list[Any]:
    views = []
    for view in step.inputs:
        names = [part.name for part in view.parts]
        key = repr([view.source, names if view.is_identity else view.parts, view.adapter])
        rows = fingerprints.of_bytes(bytes(memoryview(view.rows.rows))) if view.rows else ""  # type: ignore[arg-type]
        views.append(key + rows)
    return [step.name, step.method, list(step.weights), step.mllm_weight, views]


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
    base_rows = base[1].vocabulary if base else {}
    steps = []
    for pair in alignment.pairs:
        inputs = [_mllm_view(pair), view_of(1, pair, alignment.vocabulary, reasoner)]
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
        )
        steps.append(store_as(recipe, step))
    if not steps:
        raise AlignmentError(
            "no tensor is matched in the reasoner and in the base alike.",
            remedy="Compare their names with: drift-prior align BASE MLLM --json",
        )
    return build_plan(recipe, sources, steps, "prior", PRIOR_METADATA)


def build_plan(
    recipe: Recipe,
    sources: tuple[Checkpoint, ...],
    steps: Sequence[Step],
    stem: str,
    metadata: Mapping[str, str],
) -> Plan:
    """Lay the outputs of steps out on disk.

    Raises:
        CheckpointError: a tensor that is computed with is quantized.
    """
    require_plain(sources, [step for step in steps if step.method != "copy"])
    scales = [(step.scale, SCALE_DTYPE, step.shape[:-1]) for step in steps if step.scale]
    layout = lay_out(
        [*((step.name, step.dtype, step.shape) for step in steps), *scales],
        stem=stem,
        max_shard_bytes=recipe.max_shard_bytes,
        metadata=metadata,
        always_numbered=stem == "prior",
    )
    by_name = {step.name: step for step in steps}
    ordered = tuple(by_name[name] for name in layout.tensors if name in by_name)
    return Plan(recipe, sources, ordered, layout)


def output_dtype(recipe: Recipe, stored: str) -> str:
    """The dtype code of an output tensor whose mllm tensor is `stored`."""
    if recipe.dtype == SOURCE_DTYPE or stored not in FLOATS:
        return stored
    return DTYPES[recipe.dtype]


def store_as(recipe: Recipe, step: Step) -> Step:
    """A step of a prior with the dtype that it is stored in.

    Args:
        recipe: of the prior.
        step: its `dtype` is the mllm's.

    Raises:
        AlignmentError: its name looks like that of the scales of another tensor.
    """
    if recipe.dtype not in COMPRESSED:
        return replace(step, dtype=output_dtype(recipe, step.dtype))
    if step.name.endswith(SCALE_SUFFIX):
        raise AlignmentError(
            f"{step.name} ends with {SCALE_SUFFIX!r}, as the scales of compressed tensors do.",
            remedy="Store this prior uncompressed: --dtype bfloat16",
        )
    through = ""
    if recipe.through is not None:
        through = step.dtype if recipe.through == SOURCE_DTYPE else DTYPES[recipe.through]
    code = stored_as(step.shape, COMPRESSED[recipe.dtype], through)
    scale = scale_name(step.name) if code in CODES else ""
    return replace(step, dtype=code, scale=scale, through=through)


def _mllm_view(pair: Pair) -> View:
    return View(0, identity_parts(pair.mllm, pair.shape))


def view_of(
    source: int, pair: Pair, vocabulary: Mapping[str, RowMap], checkpoint: Checkpoint
) -> View:
    """How source number `source` fills the tensor of a pair.

    Raises:
        AlignmentError: a LoRA adapter changes, or a prior compresses, a tensor that the mllm stores
            otherwise.
    """
    whole = identity_parts(pair.parts[0].name, pair.shape)
    changed = [part.name for part in pair.parts if part.name in checkpoint.adapters]
    rows = vocabulary.get(pair.canonical)
    is_mapped = rows is not None and not rows.is_identity
    if changed and (pair.parts != whole or is_mapped):
        raise AlignmentError(
            f"{checkpoint.source.given} adapts {changed[0]}, which the mllm stores fused or split.",
            remedy="Merge the adapter into its base first: PeftModel.merge_and_unload().",
        )
    if is_mapped:
        return View(source, pair.parts, rows, is_identity=False)
    if changed:
        return View(source, pair.parts, is_identity=False, adapter=checkpoint.adapters[changed[0]])
    scaled = [part.name for part in pair.parts if part.name in checkpoint.scales]
    if scaled and pair.parts != whole:
        raise AlignmentError(
            f"{checkpoint.source.given} compresses {scaled[0]}, which the mllm stores otherwise.",
            remedy="Compute the prior again for this mllm, or without compression.",
        )
    scale = checkpoint.scales[scaled[0]] if scaled else ""
    return View(source, pair.parts, is_identity=pair.parts == whole, scale=scale)


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
        joined = RowMap(rows, num_rows - len(missing), len(missing), is_identity=False)
        shared.append(View(view.source, view.parts, joined, is_identity=False))
    return shared
