"""Extents: finished tensors, flushed and journaled about a gigabyte at a time."""

from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any

from drift_merge.engine.plan import Plan
from drift_merge.storage.journal import Results
from drift_merge.storage.output import OutputDirectory
from drift_merge.storage.shards import ShardWriter

EXTENT_BYTES = 10**9  # what a crash can cost


class Extents:
    """Collects finished tensors; flushes and journals them behind the workers' backs."""

    def __init__(self, writer: ShardWriter, output: OutputDirectory, plan: Plan) -> None:
        self._writer = writer
        self._output = output
        self._sizes = {name: info.size_bytes for name, info in plan.layout.tensors.items()}
        self._extent: Results = {}
        self._filled = 0
        self._flusher = ThreadPoolExecutor(1, "flush")
        self._flushes: list[Future[None]] = []

    def add(self, name: str, result: dict[str, Any]) -> None:
        """Take one finished tensor; raise what an earlier flush has met."""
        self._extent[name] = result
        self._filled += self._sizes[name]
        if self._filled >= EXTENT_BYTES:
            self._submit()
        for flush in [f for f in self._flushes if f.done()]:
            self._flushes.remove(flush)
            flush.result()

    def _submit(self) -> None:
        self._flushes.append(self._flusher.submit(self._flush, self._extent))
        self._extent, self._filled = {}, 0

    def _flush(self, extent: Results) -> None:
        self._writer.flush()
        self._output.record(extent)

    def __enter__(self) -> "Extents":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._submit()
        self._flusher.shutdown(wait=True)
        if error is None:
            for flush in self._flushes:
                flush.result()
