"""One streamed pass over pairs of tensors, or over the deltas of a prior; nothing is written.

A plan says what is paired: `inputs` of a step are B, A and perhaps a base, in the engine's order.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from drift_merge.engine.context import WorkerContext
from drift_merge.engine.downloads import sample_downloads
from drift_merge.engine.inputs import Inputs
from drift_merge.engine.reader import Reader, walk_steps
from drift_merge.maths.differences import PairSums, delta_
from drift_merge.names.tensors import matrix_shape
from drift_merge.plans.plan import Plan, Step
from drift_merge.priors.deltas import open_deltas
from drift_merge.priors.manifest import Prior
from drift_merge.reports.figures import TensorFigures
from drift_merge.reports.histogram import Histogram
from drift_merge.storage.fingerprints import require_unchanged
from drift_merge.storage.loans.leases import Traffic

_LANCZOS_STEPS = 12  # the largest singular value of noise, which has no gap, comes out 2 % low
_PRIOR_CHUNK = 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasureOptions:
    """How a pass is made; none of it changes a figure."""

    threads: int
    cache_limit: int  # bytes of shards from the Hub that lie here at a time
    progress: Callable[[int], None] = lambda _size: None  # bytes read since the last call


@dataclass(slots=True)
class Measured:
    """What a pass has found."""

    tensors: dict[str, TensorFigures] = field(default_factory=dict)  # by step name
    histograms: dict[str, Histogram] = field(default_factory=dict)  # of |delta|, by module
    traffic: Traffic | None = None  # what was fetched from the Hub


def measure(
    plan: Plan, places: dict[str, str], options: MeasureOptions, *, with_stable_rank: bool = False
) -> Measured:
    """Measure every pair of a plan, each read once (with the stable rank, 13 times).

    Args:
        plan: of `reports.compare`; its steps are of method "prior" and have no output.
        places: step name -> part of the model, of `figures.PARTS`.
        options: threads, disk, progress.
        with_stable_rank: of matrices, by Lanczos iteration.

    Raises:
        CheckpointError, SourceError: an input changed, or could not be fetched.
    """
    found = Measured()
    limit, names = options.cache_limit, [step.name for step in plan.steps]
    with (
        sample_downloads(plan, names, limit_bytes=limit) as downloads,
        Inputs(plan.sources, downloads.cache) as inputs,
    ):
        run = WorkerContext(inputs, torch.device("cpu"), options.progress, downloads)
        one = partial(_measure_step, run, with_stable_rank)
        pairs = walk_steps(run, None, plan.steps, one, threads=options.threads)
        for step, (figures, histogram) in pairs:
            found.tensors[step.name] = replace(figures, part=places[step.name])
            total = found.histograms.setdefault(step.module, Histogram())
            total.counts += histogram.counts
        found.traffic = downloads.traffic
    require_unchanged(*plan.sources)
    return found


def _measure_step(
    run: WorkerContext, with_stable_rank: bool, step: Step
) -> tuple[TensorFigures, Histogram]:
    reader, histogram = Reader(run, step), Histogram()
    sums, signs = PairSums(num_filled=reader.num_filled()), _Signs()
    for begin, end in reader.ranges:
        run.check()
        b, a, *base = reader.load(reader.raw(begin, end), begin, end)
        sums.add_pair(a, b)
        if base:
            signs.add(a, b, base[0])
        delta = delta_(a, b)
        histogram.add(delta)
        sums.add_delta(delta, b)  # nothing reads the chunk of B any more
    summary = sums.summary()
    is_flat = len(step.shape) != 2 or 1 in step.shape or not summary["norm_delta"]
    rank = None
    if with_stable_rank and not is_flat:
        rank = sums.delta_squared / _largest_squared(run, reader, step)
    size = sum(run.inputs.dtype(view).itemsize for view in step.inputs)
    numel = max(reader.ranges[-1][1] if reader.ranges else 0, 1)
    run.progress(size * numel)
    figures = TensorFigures(
        step.name,
        "",
        step.module,
        step.shape,
        norm_delta=summary["norm_delta"],
        norm_a=summary["norm_reasoner"],
        norm_b=summary["norm_mllm"],
        cosine=summary["cosine"] if summary["norm_reasoner"] and summary["norm_mllm"] else None,
        equal=summary["equal"],
        max_abs_delta=summary["max_abs_delta"],
        sign_agreement=signs.share if sums.is_finite else None,
        num_moved=signs.moved,
        stable_rank=rank,
    )
    return figures, histogram


@dataclass(slots=True)
class _Signs:
    """Entries that A and B have both moved from the base, and those moved to the same side."""

    moved: int = 0
    agreeing: int = 0

    def add(self, a: Tensor, b: Tensor, base: Tensor) -> None:
        ours, theirs = torch.sign(a - base), torch.sign(b - base)
        product = ours * theirs
        self.moved += int(torch.count_nonzero(product))
        self.agreeing += int((product > 0).sum())

    @property
    def share(self) -> float | None:
        return self.agreeing / self.moved if self.moved else None


def _largest_squared(run: WorkerContext, reader: Reader, step: Step) -> float:
    """Square of the largest singular value of delta, from below: Lanczos on delta^T delta.

    One pass over both tensors a step; their pages are warm. Products of float32, sums of float64.
    """
    _, cols = matrix_shape(step.shape)
    steps = min(_LANCZOS_STEPS, *step.shape)
    noise = torch.Generator().manual_seed(0)
    vector = torch.randn(cols, generator=noise, dtype=torch.float64)
    vector /= vector.norm()
    before, beta = torch.zeros_like(vector), 0.0
    diagonal, beside = [], []
    for _ in range(steps):
        image = torch.zeros(cols, dtype=torch.float64)
        narrow = vector.float()
        for begin, end in reader.ranges:
            run.check()
            b, a, *_base = reader.load(reader.raw(begin, end), begin, end)
            rows = delta_(a, b).float().view(-1, cols)
            image += rows.T @ (rows @ narrow)
        alpha = float(image @ vector)
        diagonal.append(alpha)
        image -= alpha * vector + beta * before
        beta = float(image.norm())
        if beta <= 1e-7 * max(diagonal):
            break
        beside.append(beta)
        before, vector = vector, image / beta
    inner = torch.tensor(beside[: len(diagonal) - 1], dtype=torch.float64)
    matrix = torch.diag(torch.tensor(diagonal, dtype=torch.float64))
    matrix += torch.diag(inner, 1) + torch.diag(inner, -1)
    return float(torch.linalg.eigvalsh(matrix)[-1])


def prior_histograms(
    prior: Prior, progress: Callable[[int], None] = lambda _size: None
) -> dict[str, Histogram]:
    """Histograms of |delta| as a prior stores it, by module, in one pass over its shards.

    Args:
        prior: opened, its shards on this disk.
        progress: called with the bytes of float32 that were looked at.

    Raises:
        CheckpointError: a shard is missing or broken, or differs from the manifest.
    """
    found: dict[str, Histogram] = {}
    with open_deltas(prior) as deltas, torch.inference_mode():
        for name, entry in prior.tensors.items():
            histogram = found.setdefault(str(entry["module"]), Histogram())
            rows, cols = deltas.matrix(name)
            for begin in range(0, rows * cols, _PRIOR_CHUNK):
                end = min(begin + _PRIOR_CHUNK, rows * cols)
                histogram.add(deltas.flat(name, begin, end))
                progress(4 * (end - begin))
        deltas.require_unchanged()
    return found
