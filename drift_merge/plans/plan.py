"""The plan: for every output tensor where it comes from, by which formula, and where it goes.

Plain data, made from headers alone: no torch, no tensor data. `--dry-run` prints it, the
stream executes it, and its fingerprint says whether an unfinished run may be resumed.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from drift_merge.maths.spectra.matrices import Matrix
from drift_merge.names.tensors import Part, RowMap
from drift_merge.plans.projections import EXPERT_PARTS, projections
from drift_merge.recipes.directions import NO_GATES
from drift_merge.recipes.recipe import Recipe, method_options
from drift_merge.recipes.words import PRIOR
from drift_merge.storage import fingerprints
from drift_merge.storage.checkpoint import Checkpoint, StoredAdapter
from drift_merge.storage.forms.compressed import SCALE_DTYPE
from drift_merge.storage.forms.factored import (
    U_SUFFIX,
    V_SUFFIX,
    Place,
    StoredFactors,
    factor_shapes,
)
from drift_merge.storage.headers import TensorInfo, tensor_bytes
from drift_merge.storage.manifests import TOOL
from drift_merge.storage.quantized import FLOATS, quantized_error
from drift_merge.storage.shards import ShardLayout, lay_out

COMBINE = "combine"  # the method of a step that adds up deltas


class View(NamedTuple):
    """The data of one source, seen in the shape of the output tensor."""

    source: int  # index into Plan.sources
    parts: tuple[Part, ...]
    rows: RowMap | None = None  # rows gathered by token, for embeddings of other vocabularies
    is_identity: bool = True  # one stored tensor, taken as it lies
    adapter: StoredAdapter | None = None  # LoRA factors to add, in the compute dtype
    scale: str = ""  # stored name of the scales of its rows, where it is compressed
    factors: StoredFactors | None = None  # that stand for it, in a prior of low rank


class Step(NamedTuple):
    """One output tensor. `inputs[0]` is the mllm's; then the reasoners', then the base's."""

    name: str  # in the output
    method: str  # "copy", "cast", "prior", or a merge method
    dtype: str  # of the output
    shape: tuple[int, ...]
    inputs: tuple[View, ...]
    weights: tuple[float, ...] = ()  # one per reasoner among the inputs
    mllm_weight: float = 1.0  # of the mllm's own task vector, for methods on a base
    has_base: bool = False  # the last input is the base
    module: str = "other"  # attn, mlp, mixer, norm, embed, head, other
    canonical: str = ""  # canonical name; empty outside the tower
    is_row_wise: bool = False  # the method takes whole rows only
    scale: str = ""  # output name of the scales of its rows, where it is compressed
    through: str = ""  # dtype that the result is rounded to before it is compressed
    masked_as: str = ""  # canonical name whose random masks it takes, where not its own
    second_name_of: str = ""  # name of the output tensor that is the same parameter
    matrices: tuple[Matrix, ...] = ()  # of a prior's tensor, in the order of their factors
    rank: int = 0  # of the factors that are written for it; 0: it is written itself
    coefficients: tuple[float, ...] = ()  # of a combination of priors, one per input

    @property
    def stored(self) -> list[tuple[str, str, tuple[int, ...]]]:
        """Name, dtype code and shape of what is written for it."""
        if self.rank:
            shapes = factor_shapes([place_of(matrix) for matrix in self.matrices], self.rank)
            names = (self.name + U_SUFFIX, self.name + V_SUFFIX)
            return [(name, self.dtype, shape) for name, shape in zip(names, shapes, strict=True)]
        found = [(self.name, self.dtype, self.shape)]
        return [*found, (self.scale, SCALE_DTYPE, self.shape[:-1])] if self.scale else found


def place_of(matrix: Matrix) -> Place:
    """A matrix as a manifest has it."""
    return Place(matrix.rows, matrix.cols, matrix.is_transposed)


def matrix_at(place: Place) -> Matrix:
    """The inverse of `place_of`."""
    return Matrix(place.rows, place.cols, place.is_transposed)


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything that will happen. `sources[0]` is the mllm."""

    recipe: Recipe
    sources: tuple[Checkpoint, ...]
    steps: tuple[Step, ...]  # in the order of the output files
    layout: ShardLayout

    def info(self, part: Part, source: int) -> TensorInfo:
        """The stored tensor that a part of a view names."""
        return self.sources[source].tensors[part.name]

    @property
    def parameters(self) -> list[Step]:
        """The steps that the method computes, each parameter once, whatever names it has."""
        method = self.recipe.method
        return [s for s in self.steps if s.method == method and not s.second_name_of]

    @property
    def read_bytes(self) -> int:
        """Bytes of tensor data that will be read, each view once."""
        total = 0
        for view in (view for step in self.steps for view in step.inputs):
            tensors = self.sources[view.source].tensors
            beside = [view.scale] if view.scale else []
            if view.factors is not None:
                beside += [view.factors.u, view.factors.v]
            elif view.is_identity:
                beside.append(view.parts[0].name)
            else:
                for part in view.parts:
                    total += tensor_bytes(tensors[part.name].dtype, (part.rows, part.cols))
            total += sum([tensors[name].size_bytes for name in beside])
        return total

    @property
    def write_bytes(self) -> int:
        """Bytes of tensor data that will be written."""
        return sum(info.size_bytes for info in self.layout.tensors.values())

    @property
    def beside_bytes(self) -> int:
        """Bytes of the files that are carried over from the mllm's folder; none into a prior."""
        return 0 if self.recipe.method == PRIOR else self.sources[0].folder.size_bytes

    def counts(self) -> dict[str, int]:
        """Number of output tensors by method."""
        return dict(sorted(Counter(step.method for step in self.steps).items()))

    def fingerprint(self) -> str:
        """What must be equal for a resumed run: inputs on disk, formulas, layout, version."""
        gates = gates_file(self.recipe)
        return fingerprints.of_json(
            [
                TOOL,
                self.recipe.parameters(),
                [fingerprints.of_files(source) for source in self.sources],
                [fingerprints.of_bytes(shard.header) for shard in self.layout.shards],
                [_step_key(step) for step in self.steps],
                *([] if gates is None else [fingerprints.of_file(gates)]),
            ]
        )


def gates_file(recipe: Recipe) -> Path | None:
    """The file with factors of singular directions, if the recipe names one."""
    if recipe.method == PRIOR:
        return None
    text = str(method_options(recipe).get("gates", NO_GATES))
    return None if text == NO_GATES else Path(text).expanduser()


def matrices_of(plan: Plan, step: Step) -> tuple[Matrix, ...]:
    """The matrices that an output tensor of a merge holds; see `projections`."""
    prefix = step.name.rpartition(".")[0]
    own = plan.sources[0].tensors
    beside = {
        name: own[f"{prefix}.{name.rpartition('.')[2]}"].shape
        for name in (f"{step.canonical.rpartition('.')[0]}.{part}" for part in EXPERT_PARTS)
        if f"{prefix}.{name.rpartition('.')[2]}" in own
    }
    config = plan.sources[0].config
    return projections(step.canonical, step.module, step.shape, config, beside)


def _step_key(step: Step) -> list[Any]:
    views = []
    for view in step.inputs:
        names = [part.name for part in view.parts]
        key = repr([view.source, names if view.is_identity else view.parts, view.adapter])
        rows = fingerprints.of_bytes(bytes(memoryview(view.rows.rows))) if view.rows else ""  # type: ignore[arg-type]
        views.append(key + rows)
    numbers = [*step.weights, *step.coefficients]
    return [step.name, step.method, numbers, step.mllm_weight, views]


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
    layout = lay_out(
        [entry for step in steps for entry in step.stored],
        stem=stem,
        max_shard_bytes=recipe.max_shard_bytes,
        metadata=metadata,
        always_numbered=stem == "prior",
    )
    by_name = {step.stored[0][0]: step for step in steps}
    ordered = tuple(by_name[name] for name in layout.tensors if name in by_name)
    return Plan(recipe, sources, ordered, layout)


def require_plain(sources: Sequence[Checkpoint], steps: Sequence["Step"]) -> None:
    """Refuse steps that would compute with codes instead of numbers.

    Raises:
        CheckpointError: naming the checkpoint, the format, and the first tensors.
    """
    used: dict[int, list[str]] = {}
    for step in steps:
        for view in step.inputs:
            used.setdefault(view.source, []).extend(part.name for part in view.parts)
    for index, names in used.items():
        source = sources[index]
        tensors, scales = source.tensors, source.scales
        codes = [n for n in names if tensors[n].dtype not in FLOATS and n not in scales]
        if codes:
            raise quantized_error(source, codes)
