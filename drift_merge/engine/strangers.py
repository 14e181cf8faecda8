"""Pairs that a map or other names made: refuse those whose values show that they are no pair."""

import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from math import prod
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import torch

from drift_merge.engine.inputs import Inputs
from drift_merge.engine.workspace import HostBuffer
from drift_merge.errors import AlignmentError
from drift_merge.names.tensors import Finding, matrix_shape
from drift_merge.plans.plan import Plan, Step, View
from drift_merge.storage.headers import TensorInfo
from drift_merge.storage.hub.ranges import Range, fetch_ranges, join_ranges
from drift_merge.storage.sources import RemoteShard

_LAYERS, _LAYERS_REMOTE = 8, 3  # of which a sample is read; from the Hub one request each
_SAMPLE = 2**14  # elements of each
_PARTS = 3  # tensors of more parts (experts) are looked at as one
# Merged models are near 1, relatives above 0.5; unrelated matrices of n elements 1 / sqrt(n).
_RELATED, _STRANGE, _SIGMAS = 0.3, 0.05, 4.0
_MIN_ELEMENTS = 512  # of fewer a cosine says little


def refuse_strangers(plan: Plan, findings: tuple[Finding, ...]) -> None:
    """Compare samples of each pair if a map, or names that differ, say what is which.

    Exchanged halves of a fused matrix and permuted rows have equal shapes; only their values tell.

    Args:
        plan: what will be streamed.
        findings: of the alignment; "renamed" is looked for.

    Raises:
        AlignmentError: the cosine of one kind of pairs is near 0 and that of most is not.
    """
    is_named = plan.recipe.map_file is not None or any(f.code == "renamed" for f in findings)
    if not is_named:
        return
    sums: dict[tuple[str, int], torch.Tensor] = defaultdict(lambda: torch.zeros(4))
    first: dict[tuple[str, int], str] = {}
    sampled = list(_sampled(plan))
    with (
        TemporaryDirectory(prefix="drift-merge-") as folder,
        Inputs(plan.sources, _Samples(plan, [step for _, step in sampled], folder)) as inputs,
    ):
        for kind, step in sampled:
            for region, (begin, end) in enumerate(_regions(step)):
                one, other = (_read(inputs, view, step, begin, end) for view in step.inputs[:2])
                dots = [one @ other, one @ one, other @ other, torch.tensor(float(len(one)))]
                sums[kind, region] += torch.stack(dots)
                first.setdefault((kind, region), step.canonical)
    cosines = {key: _cosine(found) for key, found in sums.items()}
    strange = [key for key, found in sums.items() if _is_strange(cosines[key], float(found[3]))]
    usual = median(cosines.values()) if cosines else 0.0
    if strange and usual > _RELATED:
        raise _refusal(strange[0], cosines, first, usual)


def _sampled(plan: Plan) -> Iterator[tuple[str, Step]]:
    """Yield matrices of a few layers of each kind, a kind being a name without its numbers."""
    kinds: dict[str, list[Step]] = defaultdict(list)
    for step in plan.steps:
        is_plain = not any(view.adapter or view.scale or view.rows for view in step.inputs)
        if len(step.inputs) > 1 and step.canonical and len(step.shape) > 1 and is_plain:
            kinds[re.sub(r"\d+", "N", step.canonical)].append(step)
    layers = _LAYERS_REMOTE if any(source.remote for source in plan.sources) else _LAYERS
    for kind, steps in kinds.items():
        for step in steps[:: -(-len(steps) // layers)]:
            yield kind, step


class _Samples:
    """The rows to compare of the shards that are on the Hub, each at its place in a sparse file."""

    def __init__(self, plan: Plan, steps: Sequence[Step], folder: str) -> None:
        self.on_evict: Callable[[RemoteShard], None] = lambda _: None  # nothing goes
        self._folder = Path(folder)
        ranges: dict[RemoteShard, list[Range]] = defaultdict(list)
        for step in steps:
            for begin, end in _regions(step):
                for view in step.inputs[:2]:
                    source = plan.sources[view.source]
                    for info, found in _ranges(source.tensors, view, step, begin, end):
                        if info.shard in source.remote:
                            ranges[source.remote[info.shard]].append(found)
        for shard, wanted in ranges.items():
            fetch_ranges(shard, join_ranges(wanted), self.path(shard), lambda _: None)

    def path(self, shard: RemoteShard) -> Path:
        return self._folder / shard.place

    def covers(self, shard: RemoteShard, info: TensorInfo) -> bool:
        return self.path(shard).is_file()


def _ranges(
    tensors: Mapping[str, TensorInfo], view: View, step: Step, begin: int, end: int
) -> Iterator[tuple[TensorInfo, Range]]:
    """Yield where elements [begin, end) of a step, whole rows, are stored: bytes of a shard."""
    cols = matrix_shape(step.shape)[1]
    for part in view.parts:
        top, bottom = max(part.row, begin // cols), min(part.row + part.rows, end // cols)
        if top < bottom:
            info = tensors[part.name]
            first = part.offset + (top - part.row) * part.row_stride
            last = first + (bottom - top - 1) * part.row_stride + (part.cols - 1) * part.col_stride
            size = info.size_bytes // prod(info.shape)
            yield info, (info.start + first * size, info.start + (last + 1) * size)


def _regions(step: Step) -> list[tuple[int, int]]:
    """Return the elements to compare: a few whole rows of each part of the tensor."""
    rows, cols = matrix_shape(step.shape)
    spans = {(part.row, part.rows) for view in step.inputs[:2] for part in view.parts}
    inner = sorted(span for span in spans if span != (0, rows))
    parts = inner if 0 < len(inner) <= _PARTS else [(0, rows)]
    found = []
    for row, count in parts:
        taken = min(count, max(1, _SAMPLE // cols))
        start = row + (count - taken) // 2
        found.append((start * cols, (start + taken) * cols))
    return found


def _read(inputs: Inputs, view: View, step: Step, begin: int, end: int) -> torch.Tensor:
    values, _ = inputs.chunk(view, step.shape, begin, end, HostBuffer(pinned=False))
    return values.float()


def _cosine(sums: torch.Tensor) -> float:
    dot, one, other, _ = sums.tolist()
    # Zeros say nothing: a matrix that starts at zero is no stranger.
    return float(dot / (one * other) ** 0.5) if one and other else 1.0


def _is_strange(cosine: float, elements: float) -> bool:
    return elements >= _MIN_ELEMENTS and abs(cosine) < max(_STRANGE, _SIGMAS / elements**0.5)


def _refusal(
    key: tuple[str, int],
    cosines: dict[tuple[str, int], float],
    first: dict[tuple[str, int], str],
    usual: float,
) -> AlignmentError:
    kind, region = key
    has_parts = sum(other == kind for other, _ in cosines) > 1
    where = f"part {region + 1} of {first[key]}" if has_parts else first[key]
    return AlignmentError(
        f"{where} and what it is paired with are not the same matrix: their cosine is"
        f" {cosines[key]:.3f} in the layers sampled, that of most pairs {usual:.3f}. Its rows lie"
        " in another order (q and k of Meta's layout), its halves are exchanged, or it is another"
        " matrix.",
        remedy="Correct the map: a fused matrix with up before gate is mlp.up_gate_proj, not"
        " mlp.gate_up_proj; what is stored in another order of rows cannot be paired: write null"
        " for it on both sides.",
    )
