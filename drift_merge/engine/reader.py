"""Reads the inputs of a step chunk by chunk, in the dtype of the arithmetic; see `Reader`."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

from drift_merge.engine.context import WorkerContext
from drift_merge.engine.inputs import chunks
from drift_merge.engine.workspace import chunk_elements
from drift_merge.maths.chunks import Chunk
from drift_merge.names.tensors import matrix_shape
from drift_merge.plans.plan import Plan, Step, View
from drift_merge.storage.fingerprints import Fingerprint

T = TypeVar("T")

# A sample is runs of this many elements, one run in so many.
_SAMPLE_RUN, _SAMPLE_EVERY = 2**12, 64

Raw = list[tuple[Tensor, memoryview]]  # of every input, in the stored dtype; and its bytes


class _Factors:
    """The LoRA factors of one input, small enough to be held whole in the compute dtype."""

    def __init__(self, run: WorkerContext, view: View, compute: torch.dtype) -> None:
        assert view.adapter is not None
        self._scale = view.adapter.scale
        factors = run.inputs.factors(view)
        self._bytes = [data for _, data in factors]
        a, b, *norms = (factor.to(run.device, compute) for factor, _ in factors)
        # A transposed matrix takes (B @ A)^T = A^T @ B^T.
        self._left, self._right = (a.T, b.T) if view.adapter.is_transposed else (b, a)
        self._magnitude = norms[0] if norms else None

    def add_to(self, rows: Tensor, first: int) -> None:
        """Add the scaled product to a block of whole rows whose first is number `first`."""
        last = first + rows.shape[0]
        rows.addmm_(self._left[first:last], self._right, alpha=self._scale)
        if self._magnitude is not None:
            norms = torch.linalg.vector_norm(rows, dim=1)
            rows.mul_((self._magnitude[first:last] / norms)[:, None])

    def fingerprint(self, fingerprint: Fingerprint) -> None:
        """The factors are a part of the input's bytes."""
        for data in self._bytes:
            fingerprint.update(data)


class Reader:
    """Reads the inputs of one step chunk by chunk, in the compute dtype."""

    def __init__(self, run: WorkerContext, step: Step) -> None:
        self._run, self._step, self._workspace = run, step, run.workspace()
        stored = [run.inputs.dtype(view) for view in step.inputs]
        self._compute = torch.float64 if torch.float64 in stored else torch.float32
        rows, self._cols = matrix_shape(step.shape)
        self._numel = rows * self._cols
        self._scales = {
            slot: run.inputs.scales(view) for slot, view in enumerate(step.inputs) if view.scale
        }
        self._lowrank = {
            slot: run.inputs.lowrank(view) for slot, view in enumerate(step.inputs) if view.factors
        }
        self._by_rows = bool(step.is_row_wise or step.scale or step.rank or self._scales)
        self._by_rows = self._by_rows or bool(self._lowrank)
        self._factors = {
            slot: _Factors(run, view, self._compute)
            for slot, view in enumerate(step.inputs)
            if view.adapter is not None
        }
        self.ranges = self._cut(chunk_elements(run.device))

    def _cut(self, elements: int) -> list[tuple[int, int]]:
        return chunks(self._step, elements, by_rows=self._by_rows)

    def raw(self, begin: int, end: int, hashes: list[Fingerprint] | None = None) -> Raw:
        """Elements [begin, end) of every input as stored; their bytes go to `hashes`."""
        found: Raw = []
        for slot, view in enumerate(self._step.inputs):
            scratch = self._workspace.scratch(slot)
            if slot in self._lowrank:
                block = self._unfactored(slot, begin, end)
                found.append((block, memoryview(b"")))  # its bytes are those of the factors
                continue
            found.append(self._run.inputs.chunk(view, self._step.shape, begin, end, scratch))
        if hashes is not None and begin == 0:  # before the data, wherever that is cut
            self._hash_beside(hashes)
        for fingerprint, (_, data) in zip(hashes or [], found, strict=False):
            fingerprint.update(data)
        return found

    def _hash_beside(self, hashes: list[Fingerprint]) -> None:
        """Add the bytes of what is held whole: factors and scales."""
        for slot, factors in self._factors.items():
            factors.fingerprint(hashes[slot])
        for slot, (_, data) in self._scales.items():
            hashes[slot].update(data)
        for slot, (_, parts) in self._lowrank.items():
            for data in parts:
                hashes[slot].update(data)

    def _unfactored(self, slot: int, begin: int, end: int) -> Tensor:
        """Whole rows of a delta of low rank, flat, float32."""
        block = self._workspace.scratch(slot).tensor(torch.float32, end - begin)
        rows = (begin // self._cols, end // self._cols)
        self._lowrank[slot][0].dense(rows, (0, self._cols), block.view(-1, self._cols))
        return block

    def load(self, raw: Raw, begin: int, end: int) -> list[Tensor]:
        """Those elements in the compute dtype on the device, in scratch memory."""
        loaded = [
            self._workspace.load(slot, tensor, self._compute)
            for slot, (tensor, _) in enumerate(raw)
        ]
        for slot, (scales, _) in self._scales.items():
            rows = scales[begin // self._cols : end // self._cols].to(self._run.device)
            loaded[slot].view(-1, self._cols).mul_(rows[:, None])
        for slot, factors in self._factors.items():
            factors.add_to(loaded[slot].view(-1, self._cols), begin // self._cols)
        self._fill_missing_rows(loaded, begin, end)
        return loaded

    def _fill_missing_rows(self, loaded: list[Tensor], begin: int, end: int) -> None:
        """Rows without a partner: nothing may be added to them.

        A row that the base lacks is the mllm's in every input, so that no task vector has it; a
        row that a reasoner lacks is the base's (the mllm's without a base), so that its own does
        not.
        """
        has_base = self._step.has_base
        origin = loaded[-1] if has_base else loaded[0]
        if has_base:
            for chunk in loaded[1:]:
                self._copy_rows(self._step.inputs[-1], loaded[0], chunk, begin, end)
        reasoners = slice(1, -1 if has_base else None)
        for view, chunk in zip(self._step.inputs[reasoners], loaded[reasoners], strict=True):
            self._copy_rows(view, origin, chunk, begin, end)

    def num_filled(self) -> int:
        """Entries of the whole tensor that some input lacks, so that they are another's."""
        num_rows = self._numel // self._cols if self._cols else 0
        lacking: set[int] = set()
        for view in self._step.inputs[1:]:
            if view.rows is not None:
                lacking.update(self._run.inputs.missing_rows(view, 0, num_rows))
        return len(lacking) * self._cols

    def keep_rows(self, raw: Raw, result: Tensor, begin: int, end: int) -> None:
        """Write the mllm's own rows over those of a result that have no partner at all.

        Few methods give back a row exactly where all inputs agree on it: slerp scales it, float32
        rounds. What nothing explains stays as it is, to the bit.
        """
        first, last = begin // self._cols, end // self._cols
        views = self._step.inputs[1:]
        base = views[-1:] if self._step.has_base else ()
        reasoners = views[:-1] if self._step.has_base else views
        lacking = [set(self._run.inputs.missing_rows(v, first, last)) for v in reasoners]
        kept = set.intersection(*lacking) if lacking else set()
        for view in base:
            kept |= set(self._run.inputs.missing_rows(view, first, last))
        if kept:
            rows = torch.tensor(sorted(kept), device=result.device)
            own = raw[0][0].view(-1, self._cols)[rows.cpu()]
            result.view(-1, self._cols)[rows] = own.to(result.device, result.dtype)

    def _copy_rows(self, view: View, origin: Tensor, chunk: Tensor, begin: int, end: int) -> None:
        """Copy the rows that a view lacks from `origin` to `chunk`."""
        if view.rows is None:
            return
        rows = self._run.inputs.missing_rows(view, begin // self._cols, end // self._cols)
        chunk.view(-1, self._cols)[rows] = origin.view(-1, self._cols)[rows]

    def chunk(self, begin: int, loaded: list[Tensor]) -> Chunk:
        """Loaded inputs as a merge method sees them."""
        mllm, *reasoners = loaded
        base = reasoners.pop() if self._step.has_base else None
        return Chunk(begin, self._cols, mllm, reasoners, base)

    def walk(
        self, *, sample: bool = False, within: tuple[int, int] | None = None
    ) -> Iterator[Chunk]:
        """All chunks in order, or a sample of short runs spread evenly; see `maths.chunks.Read`."""
        ranges = self._cut(_SAMPLE_RUN)[::_SAMPLE_EVERY] if sample else self.ranges
        if within is not None:
            ranges = [r for r in ranges if r[0] < within[1] and within[0] < r[1]]
        for begin, end in ranges:
            self._run.check()
            yield self.chunk(begin, self.load(self.raw(begin, end), begin, end))


def walk_steps(
    run: WorkerContext,
    plan: Plan | None,
    steps: Sequence[Step],
    measure: Callable[[Step], T],
    *,
    threads: int,
) -> Iterator[tuple[Step, T]]:
    """Measure the inputs of every step, on a pool of threads.

    Args:
        run: of the stream.
        plan: whose steps they are; None where looking is all the work there is.
        steps: all that the method computes.
        measure: what to find of one step; called in inference mode.
        threads: workers.

    Returns:
        Steps and what was found, in the order of the work: it depends on where the inputs are.
    """
    by_name = {step.name: step for step in steps}

    def measured(name: str) -> tuple[Step, T]:
        with (
            run.borrow(name),
            torch.inference_mode(),
            run.workspace().on_stream(),
        ):
            return by_name[name], measure(by_name[name])

    with ThreadPoolExecutor(threads) as pool:
        try:
            yield from pool.map(measured, run.downloads.begin(by_name, plan))
        except BaseException:
            run.stop.set()  # those that wait for shards must not wait on
            raise
