"""One output tensor: copied byte for byte, or computed chunk by chunk.

Results depend on the step and the inputs alone; threads, order and interruption are the
stream's business.
"""

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from drift_merge.engine.finiteness import count_nonfinite, refuse_nonfinite
from drift_merge.engine.inputs import Inputs, chunks
from drift_merge.engine.plan import Plan, Step
from drift_merge.engine.recipe import PRIOR, method_options, method_variant
from drift_merge.engine.workspace import DTYPES, Workspace, chunk_elements
from drift_merge.maths.chunks import Chunk, Settings
from drift_merge.maths.deltas import PairSums, delta_
from drift_merge.maths.methods import METHODS
from drift_merge.maths.rounding import change_kept
from drift_merge.names.tensors import matrix_shape
from drift_merge.storage import fingerprints
from drift_merge.storage.fingerprints import Fingerprint
from drift_merge.storage.headers import TensorInfo
from drift_merge.storage.mapped import RELEASE_BYTES

# A sample is runs of this many elements, one run in so many.
_SAMPLE_RUN, _SAMPLE_EVERY = 2**12, 64

Progress = Callable[[int], None]  # called with the bytes written since the last call


class Sink(Protocol):
    """Where the bytes of the output go."""

    def write(self, info: TensorInfo, begin: int, data: Any) -> None:
        """Put bytes at [begin, begin + len) of the data of a tensor."""


class Stopped(Exception):
    """Another worker failed or the user interrupted; this one gives up its tensor."""


@dataclass(slots=True)
class Run:
    """What the workers of one run share."""

    plan: Plan
    inputs: Inputs
    writer: Sink
    device: torch.device
    progress: Progress
    stop: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)
    local: threading.local = field(default_factory=threading.local)

    def workspace(self) -> Workspace:
        """This thread's buffers; made on its first tensor."""
        if not hasattr(self.local, "workspace"):
            torch.set_num_threads(1)  # intra-op threads on small chunks cost 4 to 6 times the CPU
            self.local.workspace = Workspace(self.device)
        workspace: Workspace = self.local.workspace
        return workspace


def run_step(run: Run, step: Step) -> tuple[str, dict[str, Any]]:
    """Make one output tensor.

    Returns:
        Its name and what was measured of it: fingerprints of output and inputs, and the sums of
        its method.

    Raises:
        Stopped: another worker has failed.
        CheckpointError: an input holds NaN or Inf.
    """
    workspace = run.workspace()
    with torch.inference_mode(), workspace.on_stream():
        result = _copy(run, step) if step.method == "copy" else _combine(run, step, workspace)
    refuse_nonfinite(run.plan, step, result.get("nonfinite", {}))
    return step.name, result


def _copy(run: Run, step: Step) -> dict[str, Any]:
    """Copy a tensor byte for byte; its fingerprint and a count of NaN and Inf come on the way."""
    info = run.plan.layout.tensors[step.name]
    fingerprint = Fingerprint()
    counts: dict[str, int] = {}
    pace = _Pace(run, step, info.size_bytes)
    view = step.inputs[0]
    source = run.plan.info(view.parts[0], view.source)
    mapped = run.inputs.mapped(view.source)
    window = 2**20
    for begin in range(0, info.size_bytes, window):
        end = min(begin + window, info.size_bytes)
        data = mapped.view(source, begin, end)
        fingerprint.update(data)
        run.writer.write(info, begin, data)
        if info.dtype in DTYPES and DTYPES[info.dtype].is_floating_point:
            chunk = torch.frombuffer(data, dtype=DTYPES[info.dtype])
            if bad := count_nonfinite(chunk):
                label = f"{run.plan.sources[0].source.label}: {source.name}"
                counts[label] = counts.get(label, 0) + bad
        pace.reached(end)
    text = fingerprint.text()
    result: dict[str, Any] = {"fingerprint": text, "fingerprint_mllm": text}
    return result | ({"nonfinite": counts} if counts else {})


def _combine(run: Run, step: Step, workspace: Workspace) -> dict[str, Any]:
    """Read, compute, round, write: chunk by chunk, so that memory does not grow with the tensor."""
    info = run.plan.layout.tensors[step.name]
    dtype = DTYPES[step.dtype]
    reader = _Reader(run, step, workspace)
    hashes = [Fingerprint() for _ in step.inputs]
    written, sums = Fingerprint(), PairSums(has_base=step.has_base)
    counts: dict[str, int] = {}
    kept: float | None = None
    pace = _Pace(run, step, info.size_bytes)
    formula = _formula(run.plan, step, reader, sums)
    for begin, end in reader.ranges:
        loaded = reader.load(begin, end, hashes)
        # One chunk of each tensor tells how much of the change rounding keeps.
        before = loaded[0].clone() if begin == 0 and step.weights else None
        result = formula(begin, loaded)
        out, data = workspace.store(result, dtype)
        if before is not None:
            kept = change_kept(before, result, out)
        # The rounded values are looked at: what was finite may be too large for the output dtype.
        if count_nonfinite(out) or not sums.is_finite:
            _count_all(run, step, workspace, (begin, end), out, counts)
        written.update(data)
        run.writer.write(info, begin * dtype.itemsize, data)
        pace.reached(end * dtype.itemsize)
    summary = _summary(step, sums, [h.text() for h in hashes], written.text(), counts)
    return summary | ({"change_kept": kept} if step.weights else {})


Formula = Callable[[int, list[Tensor]], Tensor]  # first element and loaded chunks -> output chunk


def _formula(plan: Plan, step: Step, reader: "_Reader", sums: PairSums) -> Formula:
    """The function from the chunks of the inputs to the chunk of the output."""
    if step.method == "cast":
        return lambda _, loaded: loaded[0]
    if step.method == PRIOR:
        return lambda _, loaded: _delta(loaded, sums)
    method = METHODS[step.method]
    settings = _settings(plan, step)
    state = method.measure(reader.walk, settings) if method.measure else None
    return lambda begin, loaded: method.combine(reader.chunk(begin, loaded), state, settings)


def _delta(loaded: list[Tensor], sums: PairSums) -> Tensor:
    mllm, reasoner, *base = loaded
    sums.add_pair(reasoner, mllm)
    result = delta_(reasoner, base[0] if base else mllm)
    sums.add_delta(result)
    return result


def _settings(plan: Plan, step: Step) -> Settings:
    recipe = plan.recipe
    options = method_options(recipe)
    return Settings(
        weights=step.weights,
        mllm_weight=step.mllm_weight,
        variant=method_variant(recipe),
        numbers={k: float(v) for k, v in options.items() if not isinstance(v, bool)},
        flags={k: v for k, v in options.items() if isinstance(v, bool)},
        key=fingerprints.key_of(recipe.seed, step.method, step.canonical),
        shape=step.shape,
        is_weighted=bool(recipe.weights),
    )


class _Reader:
    """The inputs of one step, chunk by chunk, in the compute dtype."""

    def __init__(self, run: Run, step: Step, workspace: Workspace) -> None:
        self._run, self._step, self._workspace = run, step, workspace
        stored = [run.inputs.dtype(view) for view in step.inputs]
        self._compute = torch.float64 if torch.float64 in stored else torch.float32
        _, self._cols = matrix_shape(step.shape)
        self._by_rows = step.method in METHODS and METHODS[step.method].row_wise
        self.ranges = self._cut(chunk_elements(run.device))

    def _cut(self, elements: int) -> list[tuple[int, int]]:
        return chunks(self._step, elements, by_rows=self._by_rows)

    def load(self, begin: int, end: int, hashes: list[Fingerprint] | None = None) -> list[Tensor]:
        """Elements [begin, end) of every input; their stored bytes go to `hashes`."""
        loaded = []
        for slot, view in enumerate(self._step.inputs):
            scratch = self._workspace.scratch(slot)
            raw, data = self._run.inputs.chunk(view, self._step.shape, begin, end, scratch)
            if hashes is not None:
                hashes[slot].update(data)
            loaded.append(self._workspace.load(slot, raw, self._compute))
        _fill_missing_rows(self._run, self._step, loaded, begin, end)
        return loaded

    def chunk(self, begin: int, loaded: list[Tensor]) -> Chunk:
        """Loaded inputs as a merge method sees them."""
        mllm, *reasoners = loaded
        base = reasoners.pop() if self._step.has_base else None
        return Chunk(begin, self._cols, mllm, reasoners, base)

    def walk(self, *, sample: bool = False) -> Iterator[Chunk]:
        """All chunks in order, or a sample of short runs spread evenly; see `maths.chunks.Read`."""
        ranges = self._cut(_SAMPLE_RUN)[::_SAMPLE_EVERY] if sample else self.ranges
        size = self._run.plan.layout.tensors[self._step.name].numel
        mark = 0
        for begin, end in ranges:
            if self._run.stop.is_set():
                raise Stopped
            yield self.chunk(begin, self.load(begin, end))
            if end == size or end - mark >= RELEASE_BYTES // 4:
                self._run.inputs.release(self._step, mark, end, size)
                mark = end


def _fill_missing_rows(run: Run, step: Step, loaded: list[Tensor], begin: int, end: int) -> None:
    """A row without a partner takes the mllm's values, so that nothing is added to it."""
    if all(view.rows is None for view in step.inputs):
        return
    _, cols = matrix_shape(step.shape)
    for view, chunk in zip(step.inputs[1:], loaded[1:], strict=True):
        rows = run.inputs.missing_rows(view, begin // cols, end // cols)
        chunk.view(-1, cols)[rows] = loaded[0].view(-1, cols)[rows]


def _count_all(
    run: Run,
    step: Step,
    workspace: Workspace,
    bounds: tuple[int, int],
    out: Tensor,
    counts: dict[str, int],
) -> None:
    """Count NaN and Inf of a suspicious chunk, in each input and in the rounded output."""
    bad_output = count_nonfinite(out)
    for slot, view in enumerate(step.inputs):
        raw, _ = run.inputs.chunk(view, step.shape, *bounds, workspace.scratch(slot))
        if bad := count_nonfinite(raw):
            name = view.parts[0].name
            label = f"{run.plan.sources[view.source].source.label}: {name}"
            counts[label] = counts.get(label, 0) + bad
            bad_output = 0
    if bad_output:
        label = f"the result in {step.dtype}: {step.name}"
        counts[label] = counts.get(label, 0) + bad_output


@dataclass(slots=True)
class _Pace:
    """Counts along one tensor: gives up when asked to, hands pages back, reports progress."""

    run: Run
    step: Step
    size_bytes: int  # of the output tensor
    mark: int = 0  # everything before this byte has been released and reported

    def reached(self, end: int) -> None:
        """Bytes [0, end) of the output tensor are written."""
        if self.run.stop.is_set():
            raise Stopped
        if end < self.size_bytes and end - self.mark < RELEASE_BYTES:
            return
        self.run.inputs.release(self.step, self.mark, end, self.size_bytes)
        self.run.progress(end - self.mark)
        self.mark = end


def _summary(
    step: Step, sums: PairSums, inputs: list[str], written: str, counts: dict[str, int]
) -> dict[str, Any]:
    result: dict[str, Any] = {"fingerprint": written, "fingerprint_mllm": inputs[0]}
    if step.has_base:
        result["fingerprint_base"] = inputs.pop()
    if step.method == PRIOR:
        result |= {"fingerprint_reasoner": inputs[1], **sums.summary()}
    elif len(inputs) > 1:
        result["fingerprint_reasoners"] = inputs[1:]
    return result | ({"nonfinite": counts} if counts else {})
