"""Makes a published output of a plan: checks, streams, finishes, re-reads, renames."""

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from drift_merge.engine.downloads import PlannedOutputs, open_downloads
from drift_merge.engine.ranks.division import share_of
from drift_merge.engine.reread import compare, read_shards
from drift_merge.errors import SourceError, VerificationError
from drift_merge.plans.plan import Plan
from drift_merge.recipes.words import DEFAULT_CACHE_SIZE
from drift_merge.storage.fingerprints import require_unchanged
from drift_merge.storage.forms.compressed import stored_fingerprints
from drift_merge.storage.loans.leases import Traffic
from drift_merge.storage.measured import Results
from drift_merge.storage.output import OutputDirectory
from drift_merge.storage.outputs.existing import Overwrite, check_output, note_together
from drift_merge.storage.ranks.meeting import ALONE, Ranks
from drift_merge.storage.sizes import parse_size

Finish = Callable[[OutputDirectory, Results], None]  # writes index, manifest, card, sidecars


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOptions:
    """How a plan is executed; none of it changes a byte of the output."""

    threads: int
    device: str = "cpu"
    overwrite: Overwrite = False
    progress: Callable[[int], None] = lambda _size: None  # bytes written since the last call
    cache_limit: int = parse_size(
        DEFAULT_CACHE_SIZE
    )  # of shards from the Hub that lie here at a time
    arrived: Callable[[int], None] = lambda _size: None  # bytes downloaded since the last call
    ranks: Ranks = ALONE  # the processes that share the work


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a run did."""

    results: Results  # per output tensor, in the order of the plan
    num_resumed: int  # tensors taken over from an interrupted run
    was_published: bool  # the very same plan was complete already
    seconds: float = 0.0  # from the first read to the published output
    traffic: Traffic | None = None  # what was fetched from the Hub on the way


def check_plan(plan: Plan, out: Path, *, overwrite: Overwrite) -> None:
    """Refuse an output that exists or would destroy an input; part of `--dry-run`.

    Raises:
        OutputError: naming the clash.
    """
    inputs = [folder for source in plan.sources for folder in source.directories]
    check_output(out, inputs, overwrite=overwrite)


@dataclass(frozen=True, slots=True)
class Job:
    """One output to be made."""

    plan: Plan  # its sources are local
    out: Path  # the directory that will exist, whole, at the end
    finish: Finish


def execute(plan: Plan, out: Path, options: RunOptions, finish: Finish) -> Outcome:
    """Execute a plan and publish its output, resuming an interrupted run of the same plan.

    Args:
        plan: what to do; its sources are local.
        out: the directory that will exist, whole, at the end.
        options: how.
        finish: writes everything beside the shards into the payload.

    Raises:
        OutputError, CheckpointError: see `stream`; `out` is then as it was before.
    """
    return execute_all([Job(plan, out, finish)], options)[0]


def execute_all(jobs: Sequence[Job], options: RunOptions) -> list[Outcome]:
    """Execute plans on the same sources in one pass over them; publish every output.

    Raises:
        OutputError, CheckpointError: see `stream`; outputs not published yet can be resumed.
    """
    started = time.monotonic()
    ranks = options.ranks
    with ranks.failing_together(), ExitStack() as stack:
        for job in jobs:
            check_plan(job.plan, job.out, overwrite=options.overwrite)
        _require_one_plan(jobs, ranks)  # nobody has written anything before all have looked
        outputs = [
            stack.enter_context(
                OutputDirectory(
                    job.out,
                    plan=job.plan.fingerprint(),
                    overwrite=options.overwrite,
                    ranks=ranks,
                )
            )
            for job in jobs
        ]
        stack.enter_context(ranks.failing_together())  # the others stop before outputs are left
        todo = [n for n, output in enumerate(outputs) if not output.is_published]
        resumed = {number: dict(outputs[number].finished) for number in todo}
        results: list[Results] = []
        traffic = None
        if todo:
            pairs = [(jobs[number].plan, outputs[number]) for number in todo]
            results, traffic = _stream(pairs, options)
        require_unchanged(*{id(s): s for job in jobs for s in job.plan.sources}.values())
        made = dict(zip(todo, results, strict=True))
        outcomes = []
        for number, (job, output) in enumerate(zip(jobs, outputs, strict=True)):
            if number in made:
                _publish(job, output, made[number], resumed[number], options)
                seconds = time.monotonic() - started
                found = len(resumed[number])
                outcomes.append(Outcome(made[number], found, False, seconds, traffic))
            else:
                outcomes.append(Outcome({}, 0, True))
        if ranks.is_first and len(outputs) > 1:
            note_together([(output.out, output.plan) for output in outputs])
        for output in outputs if ranks.is_first else ():
            output.tidy()
        ranks.wait()
    return outcomes


def _require_one_plan(jobs: Sequence[Job], ranks: Ranks) -> None:
    """Refuse ranks that see other inputs than the first."""
    if ranks.size == 1:
        return
    own = [job.plan.fingerprint() for job in jobs]
    if ranks.share(own) != own:
        raise SourceError(
            "the inputs are not those that the first rank sees: other files, sizes or times.",
            remedy="Put them on a file system that all hosts share, or copy them with their times: "
            "rsync -a",
        )


def _stream(pairs: PlannedOutputs, options: RunOptions) -> tuple[list[Results], Traffic | None]:
    ranks = options.ranks
    share = None
    if ranks.size > 1:
        whole = ranks.share(not all(output.is_coherent for _, output in pairs))
        plans = [plan for plan, _ in pairs]
        share = share_of(plans, ranks.rank, ranks.size, whole_shards=whole)
    with open_downloads(
        pairs,
        limit_bytes=options.cache_limit // ranks.place.local_size,
        report=options.arrived,
        share=share,
    ) as downloads:
        downloads.start()
        # Imports torch: only when there is work, and while the first shards arrive.
        from drift_merge.engine.stream import stream

        results = stream(
            pairs,
            threads=options.threads,
            device=options.device,
            progress=options.progress,
            downloads=downloads,
            ranks=ranks,
            share=share,
        )
    return results, downloads.traffic


def _publish(
    job: Job, output: OutputDirectory, results: Results, resumed: Results, options: RunOptions
) -> None:
    ranks = options.ranks
    _reread_resumed(job.plan, output, resumed, options)
    ranks.wait()  # for the journals of the others
    if not ranks.is_first:
        return
    if ranks.size > 1:
        output.gather_journals()
        # In the order of the plan, since means over all tensors depend on it.
        results = {step.name: output.finished[step.name] for step in job.plan.steps}
    if job.plan.layout.index is not None:
        output.write_file(*job.plan.layout.index)
    job.finish(output, results)
    _reread_headers(job.plan, output)
    output.publish(tidy=False)


def _reread_headers(plan: Plan, output: OutputDirectory) -> None:
    headers = read_shards(output.payload, [shard.file for shard in plan.layout.shards])
    for header in headers.values():
        for name, info in header.tensors.items():
            if plan.layout.tensors[name] != info:
                raise VerificationError(
                    f"the header of {header.shard} differs from what was written.",
                    remedy="Check the disk, then run the same command again.",
                )


def _reread_resumed(
    plan: Plan, output: OutputDirectory, resumed: Results, options: RunOptions
) -> None:
    """The tensors of an earlier run, which the stream has not read back; each rank some."""
    ranks = options.ranks
    fingerprints = stored_fingerprints(resumed)
    infos = [plan.layout.tensors[name] for name in fingerprints][ranks.rank :: ranks.size]
    compare(output.payload, infos, fingerprints, threads=options.threads)
