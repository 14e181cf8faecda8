"""Executes every step of one or several plans on a few workers, journaling what is finished.

Knows steps, not formulas. Every result depends on the plan and the inputs alone: not on
threads, their order or an interruption.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch

from drift_merge.engine.context import Progress, WorkerContext
from drift_merge.engine.downloads import Downloads
from drift_merge.engine.flushing import Flusher
from drift_merge.engine.inputs import Inputs
from drift_merge.engine.settings import settings_of
from drift_merge.engine.steps import Bundle, Made, OutputTarget, run_bundle
from drift_merge.engine.storing.compressing import Sink
from drift_merge.engine.whole_model import Surveyed, survey
from drift_merge.engine.workers import start
from drift_merge.maths.spectra.leading import one_thread
from drift_merge.plans.plan import Plan, Step
from drift_merge.storage.fingerprints import require_unchanged
from drift_merge.storage.forms.compressed import stored_fingerprints
from drift_merge.storage.headers import TensorInfo
from drift_merge.storage.measured import Results
from drift_merge.storage.output import OutputDirectory
from drift_merge.storage.ranks.meeting import ALONE, Ranks
from drift_merge.storage.shards import ShardWriter


class _Discard:
    """A sink for recomputation: only the fingerprints matter."""

    def write(self, info: TensorInfo, begin: int, data: Any) -> None:
        pass


def stream(
    jobs: Sequence[tuple[Plan, OutputDirectory]],
    *,
    threads: int,
    device: str = "cpu",
    progress: Progress = lambda _: None,
    downloads: Downloads | None = None,
    ranks: Ranks = ALONE,
    share: Collection[str] | None = None,
) -> list[Results]:
    """Execute plans into the payloads of their outputs, resuming where their journals end.

    Plans on the same sources whose steps share a tensor's inputs read them once.

    Args:
        jobs: plans with equal sources, each with its output, entered; the `finished` tensors of
            an output are not done again.
        threads: workers, at least 1.
        device: "cpu", "cuda" or "cuda:n"; where the arithmetic happens.
        progress: called from the workers with bytes written.
        downloads: of the jobs, entered, where sources are on the Hub.
        ranks: the processes that share the work; all call this.
        share: output tensors that this one makes; None for all.

    Returns:
        Per job, for each output tensor what was measured of it, in the order of its plan; under
        ranks of those made by this one or before. All data is on the disk.

    Raises:
        CheckpointError: an input changed, or holds NaN or Inf (unless the recipe allows it).
        SourceError: a shard could not be fetched. What was finished stays journaled.
        OutputError: the disk is full or fails. What was finished stays journaled.
    """
    results = [dict(output.finished) for _, output in jobs]
    downloads = downloads or Downloads()
    with ExitStack() as stack:
        inputs = stack.enter_context(Inputs(jobs[0][0].sources, downloads.cache))
        writers = [
            stack.enter_context(
                ShardWriter(
                    plan.layout,
                    output.payload,
                    beside_bytes=plan.beside_bytes,
                    share=len(jobs),
                    is_maker=ranks.is_first,
                )
            )
            for plan, output in jobs
        ]
        if ranks.size > 1:
            _share_files(writers, ranks)
        stack.enter_context(one_thread())
        flushers = [
            stack.enter_context(Flusher(writer, output, plan))
            for writer, (plan, output) in zip(writers, jobs, strict=True)
        ]
        for (plan, _), done in zip(jobs, results, strict=True):
            known = stored_fingerprints(done) if ranks.is_first else ()
            progress(sum(plan.layout.tensors[n].size_bytes for n in known))
        run = WorkerContext(inputs, torch.device(device), progress, downloads, ranks, share)
        surveyed = [_survey(run, plan, threads) for plan, _ in jobs]
        names = downloads.begin(
            dict.fromkeys(s.name for plan, _ in jobs for s in plan.steps if run.is_own(s.name))
        )
        found = _bundles(names, [plan for plan, _ in jobs], writers, results, surveyed)
        bundles = _large_first(found) if downloads.cache is None else list(found)
        for number, name, result in _finished(run, bundles, flushers, threads):
            results[number][name] = result
    return [
        {step.name: done[step.name] for step in plan.steps if step.name in done}
        for (plan, _), done in zip(jobs, results, strict=True)
    ]


def _share_files(writers: Sequence[ShardWriter], ranks: Ranks) -> None:
    """The first rank has made the files, with their headers; then all write into them."""
    for writer in writers if ranks.is_first else ():
        writer.flush()
    ranks.wait()


def _survey(run: WorkerContext, plan: Plan, threads: int) -> Surveyed | None:
    return survey(run, plan, settings_of, threads=threads)


def _bundles(
    names: Sequence[str],
    plans: Sequence[Plan],
    writers: Sequence[ShardWriter],
    finished: Sequence[Results],
    surveyed: Sequence[Surveyed | None],
) -> Iterator[Bundle]:
    """The unfinished steps of all plans; those that share their inputs together."""
    others = [{step.name: step for step in plan.steps} for plan in plans]
    for name in names:
        groups: list[list[OutputTarget]] = []
        for number, (plan, writer) in enumerate(zip(plans, writers, strict=True)):
            step = others[number].get(name)
            if step is None or name in finished[number]:
                continue
            target = OutputTarget(number, plan, step, writer, surveyed[number])
            group = next((g for g in groups if _share_inputs(g[0].step, step)), None)
            if group is None:
                groups.append([target])
            else:
                group.append(target)
        yield from groups


def _large_first(bundles: Iterator[Bundle]) -> list[Bundle]:
    """The same bundles, those first that could be the last one that everybody waits for."""
    found = list(bundles)
    sizes = [bundle[0].info.size_bytes * len(bundle) for bundle in found]
    large = sum(sizes) // 32
    order = sorted(range(len(found)), key=lambda i: -sizes[i] if sizes[i] > large else 0)
    return [found[i] for i in order]


def _share_inputs(one: Step, other: Step) -> bool:
    same = one.method == other.method and one.dtype == other.dtype
    return same and one.inputs == other.inputs


def recompute(
    plan: Plan,
    steps: list[Step],
    *,
    device: str = "cpu",
    downloads: Downloads | None = None,
    sinks: Mapping[str, Sink] | None = None,
) -> Results:
    """Compute some steps of a plan again, writing no file; the results hold the fingerprints.

    Args:
        plan: of the steps.
        steps: some of its steps.
        device: where to compute.
        downloads: of these steps, entered, where sources are on the Hub.
        sinks: by tensor, what takes the bytes; others are dropped.

    Raises:
        CheckpointError: an input changed, or holds NaN or Inf.
    """
    downloads, sinks = downloads or Downloads(), sinks or {}
    by_name = {step.name: step for step in steps}
    results = {}
    with Inputs(plan.sources, downloads.cache) as inputs, one_thread():
        run = WorkerContext(inputs, torch.device(device), lambda _: None, downloads)
        surveyed = _survey(run, plan, 1)
        for name in downloads.begin(by_name):
            with run.borrow(name):
                sink = sinks.get(name) or _Discard()
                made = run_bundle(run, [OutputTarget(0, plan, by_name[name], sink, surveyed)])
            results[name] = made[0][2]
    require_unchanged(*plan.sources)
    return results


def _finished(
    run: WorkerContext, bundles: Sequence[Bundle], flushers: Sequence[Flusher], threads: int
) -> Iterator[Made]:
    """Run the bundles on a pool of workers; yield each result; journal extents on the way."""
    workers = start(run, bundles, threads)
    try:
        for made in workers:
            yield from _record(made, flushers)
    finally:
        # After Ctrl-C or a failure too: what is finished is flushed and journaled.
        for made in workers.stop():
            list(_record(made, flushers))


def _record(made: list[Made], flushers: Sequence[Flusher]) -> Iterator[Made]:
    for number, name, result in made:
        flushers[number].add(name, result)
        yield number, name, result
