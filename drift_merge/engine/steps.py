"""Makes one tensor of one or several outputs: copied byte for byte, or computed by chunks.

Several outputs of a sweep share one walk over the inputs. Results depend on the step and the
inputs alone; threads, order and interruption are the stream's business.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import isfinite, prod
from typing import Any, cast

import torch
from torch import Tensor

from drift_merge.engine.context import WorkerContext
from drift_merge.engine.nonfinite import count_all, refuse_nonfinite
from drift_merge.engine.reader import Raw, Reader
from drift_merge.engine.settings import settings_of
from drift_merge.engine.storing.combining import Combination
from drift_merge.engine.storing.compressing import Compressing, Sink, through
from drift_merge.engine.storing.factoring import Factoring
from drift_merge.engine.whole_model import Surveyed
from drift_merge.engine.workspace import Workspace
from drift_merge.maths.differences import PairSums, delta_
from drift_merge.maths.dtypes import TORCH_DTYPES
from drift_merge.maths.measures import Sampler, count_nonfinite
from drift_merge.maths.methods.spectral import calibration
from drift_merge.maths.methods.spectral.by_matrix import ByMatrix
from drift_merge.maths.rounding import Kept, change_kept, round_stochastically
from drift_merge.plans.plan import COMBINE, Plan, Step
from drift_merge.recipes.recipe import method_of
from drift_merge.recipes.words import PRIOR, STOCHASTIC
from drift_merge.storage import fingerprints
from drift_merge.storage.fingerprints import Fingerprint
from drift_merge.storage.forms.compressed import COMPRESSED
from drift_merge.storage.headers import TensorInfo, tensor_bytes
from drift_merge.storage.measured import TensorRecord

_COPY_WINDOW = 2**20  # bytes
_PACE_BYTES = 2**25  # written between two reports of progress

Formula = Callable[[int, list[Tensor]], Tensor]  # first element and loaded chunks -> output chunk


@dataclass(frozen=True, slots=True)
class OutputTarget:
    """One tensor of one output."""

    number: int  # of the output among those of the run
    plan: Plan
    step: Step
    writer: Sink
    surveyed: Surveyed | None = None  # what was found over the whole model

    @property
    def info(self) -> TensorInfo:
        """Where the tensor lies in its output; of a low-rank one its first factor."""
        return self.plan.layout.tensors[self.step.stored[0][0]]

    @property
    def size_bytes(self) -> int:
        """Bytes that are written, scales included."""
        tensors = self.plan.layout.tensors
        return sum(tensors[name].size_bytes for name, _, _ in self.step.stored)


Bundle = Sequence[OutputTarget]  # the same tensor with the same inputs, for one or several outputs
Made = tuple[int, str, TensorRecord]  # number of the output, tensor, what was measured


def run_bundle(run: WorkerContext, bundle: Bundle) -> list[Made]:
    """Make one tensor of every output of a bundle.

    Returns:
        For each what was measured of it: fingerprints of output and inputs, and the sums of its
        method.

    Raises:
        Stopped: another worker has failed.
        CheckpointError: what is computed is or holds NaN or Inf.
    """
    with torch.inference_mode(), run.workspace().on_stream():
        make = _copy if bundle[0].step.method == "copy" else _combine
        results = make(run, bundle)
    for target, result in zip(bundle, results, strict=True):
        if target.step.method == "copy":
            continue  # nothing is computed: NaN and Inf are counted, and kept
        refuse_nonfinite(target.plan, target.step, result.get("nonfinite", {}))
    return [(t.number, t.step.name, r) for t, r in zip(bundle, results, strict=True)]


def _copy(run: WorkerContext, bundle: Bundle) -> list[TensorRecord]:
    """Copy a tensor byte for byte; its fingerprint and a count of NaN and Inf come on the way."""
    plan, step, info = bundle[0].plan, bundle[0].step, bundle[0].info
    fingerprint = Fingerprint()
    counts: dict[str, int] = {}
    pace = _RateLimit(run, bundle)
    view = step.inputs[0]
    source = plan.info(view.parts[0], view.source)
    mapped = run.inputs.mapped(view.source)
    memory = run.workspace().scratch(0)
    memory.tensor(torch.uint8, min(info.size_bytes, _COPY_WINDOW))
    for begin in range(0, info.size_bytes, _COPY_WINDOW):
        end = min(begin + _COPY_WINDOW, info.size_bytes)
        data = memory.bytes(end - begin)
        mapped.read(source, begin, data)
        fingerprint.update(data)
        for target in bundle:
            target.writer.write(target.info, begin, data)
        if info.dtype in TORCH_DTYPES and TORCH_DTYPES[info.dtype].is_floating_point:
            chunk = torch.frombuffer(data, dtype=TORCH_DTYPES[info.dtype])
            if bad := count_nonfinite(chunk):
                label = f"{plan.sources[0].source.label}: {source.name}"
                counts[label] = counts.get(label, 0) + bad
        pace.reached(end)
    text = fingerprint.text()
    result = TensorRecord(fingerprint=text, fingerprint_mllm=text)
    if counts:
        result["nonfinite"] = counts
    return [result.copy() for _ in bundle]


@dataclass(slots=True)
class _StepWork:
    """One target under way."""

    target: OutputTarget
    formula: Formula
    state: Any  # what the method has measured
    sums: PairSums
    written: Fingerprint = field(default_factory=Fingerprint)
    kept: Kept | None = None
    round_key: int | None = None  # of stochastic rounding; None: to nearest
    form: Compressing | Factoring | None = None  # of a tensor of a compressed or low-rank prior
    nonfinite: dict[str, int] = field(default_factory=dict)


def _combine(run: WorkerContext, bundle: Bundle) -> list[TensorRecord]:
    """Read, compute, round, write: chunk by chunk, so that memory does not grow with the tensor."""
    step, workspace = bundle[0].step, run.workspace()
    reader = Reader(run, step)
    hashes = [Fingerprint() for _ in step.inputs]
    pace = _RateLimit(run, bundle)
    works = [_begin(target, reader) for target in bundle]
    sampler = Sampler(prod(step.shape) if step.method == PRIOR else 0)
    for begin, end in reader.ranges:
        for work in works:
            if isinstance(work.state, ByMatrix):
                work.state.prepare(begin, end)
        raw = reader.raw(begin, end, hashes)
        sampler.add(begin, raw[0][0])
        for work in works:
            _chunk(work, reader, workspace, raw, begin, end)
        pace.reached(end * TORCH_DTYPES[step.dtype].itemsize)
    inputs = [fingerprint.text() for fingerprint in hashes]
    results = [_summary(work, inputs) for work in works]
    if step.method == PRIOR:
        info = bundle[0].plan.info(step.inputs[0].parts[0], step.inputs[0].source)
        for result in results:
            result["dtype_mllm"], result["sample_mllm"] = info.dtype, sampler.values
    return results


def _begin(target: OutputTarget, reader: Reader) -> _StepWork:
    sums = PairSums(has_base=target.step.has_base)
    if target.step.method == PRIOR:
        sums.num_filled = reader.num_filled()
    work = _StepWork(target, *_formula(target, reader, sums), sums)
    recipe = target.plan.recipe
    # Where nothing is added there is nothing to keep: a cast rounds to nearest.
    if recipe.round == STOCHASTIC and target.step.weights:
        name = target.step.second_name_of or target.step.name
        work.round_key = fingerprints.key_of(recipe.round_seed, "round", name)
    infos = target.plan.layout.tensors
    if target.step.rank:
        work.form = Factoring(target.step, infos, target.writer, recipe.norm, work.written)
    elif recipe.dtype in COMPRESSED or recipe.rank:
        work.form = Compressing(target.step, infos, target.writer, work.written)
    return work


def _chunk(
    work: _StepWork, reader: Reader, workspace: Workspace, raw: Raw, begin: int, end: int
) -> None:
    """One chunk of one target."""
    step, info = work.target.step, work.target.info
    dtype = TORCH_DTYPES[step.dtype]
    loaded = reader.load(raw, begin, end)
    # One chunk of each tensor tells how much of the change rounding keeps.
    before = loaded[0].clone() if begin == 0 and step.weights else None
    result = work.formula(begin, loaded)
    if step.weights:
        reader.keep_rows(raw, result, begin, end)
    if work.form is not None:
        result = through(step, result)
        if step.scale or step.rank:
            if not work.form.write(workspace, result, begin) or not work.sums.is_finite:
                count_all(work.target.plan, step, raw, result, work.nonfinite)
            return
    out, data = workspace.store(_rounded(work, result, dtype, begin), dtype)
    if isinstance(work.form, Compressing):
        work.form.add_plain(result, out)
    if before is not None:
        work.kept = change_kept(before, result, out)
    # The rounded values are looked at: what was finite may be too large for the output dtype.
    if count_nonfinite(out) or not work.sums.is_finite:
        count_all(work.target.plan, step, raw, out, work.nonfinite)
    work.written.update(data)
    work.target.writer.write(info, begin * dtype.itemsize, data)


def _rounded(work: _StepWork, result: Tensor, dtype: torch.dtype, begin: int) -> Tensor:
    """The result as it is, to be rounded to nearest, or rounded by chance already."""
    if work.round_key is None:
        return result
    return round_stochastically(result, dtype, work.round_key, begin)


def _formula(target: OutputTarget, reader: Reader, sums: PairSums) -> tuple[Formula, Any]:
    """The function from the chunks of the inputs to the chunk of the output; its state."""
    step = target.step
    if step.method == "cast":
        return lambda _, loaded: loaded[0], None
    if step.method == PRIOR:
        return lambda _, loaded: _delta(loaded, sums), None
    if step.method == COMBINE:
        combination = Combination(step.coefficients)
        return lambda _, loaded: combination.add_up(loaded), combination
    method = method_of(target.plan.recipe)
    settings = settings_of(target.plan, step)
    state = None
    if target.surveyed is not None:
        settings = target.surveyed.settings_of(step, settings)
        state = target.surveyed.state_of(step)
    if state is None and method.measure is not None:
        state = method.measure(reader.walk, settings)
    combine = method.combine
    if calibration.is_asked(settings):
        state, combine = calibration.calibrated(reader.walk, settings, method, state)
    return lambda begin, loaded: combine(reader.chunk(begin, loaded), state, settings), state


def _delta(loaded: list[Tensor], sums: PairSums) -> Tensor:
    mllm, reasoner, *base = loaded
    sums.add_pair(reasoner, mllm)
    result = delta_(reasoner, base[0] if base else mllm)
    sums.add_delta(result, mllm)  # nothing reads the mllm's chunk any more
    return result


@dataclass(slots=True)
class _RateLimit:
    """Counts along one tensor: gives up when asked to, reports progress."""

    run: WorkerContext
    bundle: Bundle
    mark: int = 0  # everything before this byte of the first target is reported

    def reached(self, end: int) -> None:
        """Bytes [0, end) of the first target's tensor are written."""
        self.run.check()
        step = self.bundle[0].step
        size = tensor_bytes(step.dtype, step.shape)  # whatever is written for it
        if end < size and end - self.mark < _PACE_BYTES:
            return
        share = (end - self.mark) / size
        self.run.progress(round(share * sum(target.size_bytes for target in self.bundle)))
        self.mark = end


def _summary(work: _StepWork, inputs: list[str]) -> TensorRecord:
    step, inputs = work.target.step, list(inputs)
    result = TensorRecord(fingerprint=work.written.text(), fingerprint_mllm=inputs[0])
    if step.has_base:
        result["fingerprint_base"] = inputs.pop()
    if step.method == PRIOR:
        result["fingerprint_reasoner"] = inputs[1]
        result.update(_statistics(work.sums))
    elif len(inputs) > 1:
        result["fingerprint_reasoners"] = inputs[1:]
    is_combined = isinstance(work.state, Combination)
    result.update(work.state.summary() if is_combined else TensorRecord())
    if work.form is not None:
        result.update(work.form.summary())
    if step.weights:
        result.update(_of_merge(work))
    surveyed = work.target.surveyed
    if step.weights and surveyed is not None and (found := surveyed.weights_of(step)):
        mllm, *result["weights"] = found
        result["mllm_weight"] = mllm
    if work.nonfinite:
        result["nonfinite"] = work.nonfinite
    return result


def _of_merge(work: _StepWork) -> TensorRecord:
    kept, found = work.kept, TensorRecord()
    if isinstance(work.state, ByMatrix):
        found["matrices"] = work.state.num_matrices
        if work.state.stable_rank is not None:
            found["stable_rank"] = work.state.stable_rank
        found["norm_made"] = work.state.norm if isfinite(work.state.norm) else None
    found["change_kept"] = None if kept is None else kept.fraction
    if kept is not None and work.round_key is not None:
        found["change_kept_error"], found["rounding_noise"] = kept.error, kept.noise
    return found


def _statistics(sums: PairSums) -> TensorRecord:
    found, norms = sums.summary(), ("norm_delta", "norm_mllm", "norm_reasoner")
    keys = (*norms, "cosine", "max_abs_delta", "equal")
    return cast(TensorRecord, {key: found[key] for key in keys})
