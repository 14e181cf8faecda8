"""From a plan to a published output: check, stream, finish, re-read, rename."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from drift_merge.engine.plan import Plan
from drift_merge.engine.verify import compare, read_shards
from drift_merge.errors import VerificationError
from drift_merge.storage.journal import Results
from drift_merge.storage.output import OutputDirectory, check_output

Finish = Callable[[OutputDirectory, Results], None]  # writes index, manifest, card, sidecars


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOptions:
    """How a plan is executed; none of it changes a byte of the output."""

    threads: int
    device: str = "cpu"
    overwrite: bool = False
    progress: Callable[[int], None] = lambda _size: None  # bytes written since the last call


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a run did."""

    results: Results  # per output tensor, in the order of the plan
    num_resumed: int  # tensors taken over from an interrupted run
    was_published: bool  # the very same plan was complete already


def check_plan(plan: Plan, out: Path, *, overwrite: bool) -> None:
    """Refuse an output that exists or would destroy an input; part of `--dry-run`.

    Raises:
        OutputError: naming the clash.
    """
    inputs = [source.path for source in plan.sources if source.path is not None]
    check_output(out, inputs, overwrite=overwrite)


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
    from drift_merge.engine.stream import stream  # imports torch: only when there is work

    check_plan(plan, out, overwrite=options.overwrite)
    with OutputDirectory(out, plan=plan.fingerprint(), overwrite=options.overwrite) as output:
        if output.is_published:
            output.tidy()
            return Outcome({}, 0, was_published=True)
        resumed = dict(output.finished)
        results = stream(
            plan,
            output,
            threads=options.threads,
            device=options.device,
            progress=options.progress,
        )
        if plan.layout.index is not None:
            output.write_file(*plan.layout.index)
        finish(output, results)
        _read_back(plan, output, resumed, options)
        output.publish()
    return Outcome(results, len(resumed), was_published=False)


def _read_back(plan: Plan, output: OutputDirectory, resumed: Results, options: RunOptions) -> None:
    """What the stream has not read back itself: the headers, and the tensors of an earlier run."""
    headers = read_shards(output.payload, [shard.file for shard in plan.layout.shards])
    for header in headers.values():
        for name, info in header.tensors.items():
            if plan.layout.tensors[name] != info:
                raise VerificationError(
                    f"the header of {header.shard} differs from what was written.",
                    remedy="Check the disk, then run the same command again.",
                )
    compare(
        output.payload,
        [plan.layout.tensors[name] for name in resumed],
        {name: result["fingerprint"] for name, result in resumed.items()},
        threads=options.threads,
    )
