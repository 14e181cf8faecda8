"""Makes finished tensors durable: flushes, reads back and journals 250 MB of them at a time."""

from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager

from drift_merge.engine.reread import compare
from drift_merge.plans.plan import Plan
from drift_merge.storage.forms.compressed import stored_fingerprints
from drift_merge.storage.measured import Results, TensorRecord
from drift_merge.storage.output import OutputDirectory
from drift_merge.storage.shards import ShardWriter

# What a crash can cost. The last extent is flushed and read back when nothing is left to compute,
# so that a larger one, of 1 GB, made a run of 3 GB a tenth slower.
FLUSH_BYTES = 250_000_000


class Flusher(AbstractContextManager["Flusher"]):
    """Takes finished tensors; flushes, checks and journals them in a thread of its own."""

    def __init__(self, writer: ShardWriter, output: OutputDirectory, plan: Plan) -> None:
        self._writer = writer
        self._output = output
        self._infos = plan.layout.tensors
        self._extent: Results = {}
        self._filled = 0
        self._thread = ThreadPoolExecutor(1, "flush")
        self._flushes: list[Future[None]] = []

    def add(self, name: str, result: TensorRecord) -> None:
        """Take one finished tensor; raise what an earlier flush has met."""
        self._extent[name] = result
        self._filled += sum(
            self._infos[each].size_bytes for each in stored_fingerprints({name: result})
        )
        if self._filled >= FLUSH_BYTES:
            self._submit()
        for flush in [f for f in self._flushes if f.done()]:
            self._flushes.remove(flush)
            flush.result()

    def _submit(self) -> None:
        self._flushes.append(self._thread.submit(self._flush, self._extent))
        self._extent, self._filled = {}, 0

    def _flush(self, extent: Results) -> None:
        fingerprints = stored_fingerprints(extent)
        infos = [self._infos[name] for name in fingerprints]
        self._writer.flush({info.shard: None for info in infos})
        compare(self._output.payload, infos, fingerprints, threads=1)
        self._output.record(extent)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._submit()
        self._thread.shutdown(wait=True)
        if kind is None:
            for flush in self._flushes:
                flush.result()
