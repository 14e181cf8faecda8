"""What the commands say and show of `--stream`: transfers planned, bars, and what was fetched."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from drift_merge.cli import render
from drift_merge.cli.entry import ranks_of_command
from drift_merge.cli.progress import progresses
from drift_merge.cli.running import CommandOptions, require_device
from drift_merge.engine.job import RunOptions
from drift_merge.plans.plan import Plan
from drift_merge.plans.transfers import Transfers, plan_transfers
from drift_merge.storage import sizes
from drift_merge.storage.ranks.environment import own_device
from drift_merge.storage.sizes import parse_size

if TYPE_CHECKING:
    from drift_merge.engine.job import Outcome
    from drift_merge.storage.loans.leases import Traffic


def transfers_of(run: CommandOptions, plans: Sequence[Plan]) -> Transfers | None:
    """The transfers of a run; None without `--stream`, or if everything is on this disk.

    Raises:
        RecipeError: `--cache-limit` is no size, or too small for these plans.
    """
    limit = parse_size(run.cache_limit)
    return plan_transfers(plans, limit_bytes=limit) if run.stream else None


@contextmanager
def engine_options(
    run: CommandOptions, write_bytes: int, transfers: Transfers | None = None
) -> Iterator[RunOptions]:
    """The options of the engine for those of a command, with bars while it runs.

    Raises:
        RecipeError: there is no such device.
    """
    ranks = ranks_of_command()
    device = own_device(run.device, ranks.place)
    require_device(device)
    ranks.join()
    totals = {"Streaming": write_bytes}
    if transfers is not None:
        totals["Downloading"] = transfers.download_bytes
    with progresses(totals, quiet=run.quiet or run.as_json) as (advance, *more):
        yield RunOptions(
            threads=run.threads,
            device=device,
            overwrite=run.overwrite,
            progress=ranks.count_progress(advance),
            cache_limit=parse_size(run.cache_limit),
            arrived=more[0] if more else lambda _size: None,
            ranks=ranks,
        )


def print_transfers(transfers: Transfers | None, output_bytes: int) -> None:
    """The lines of a dry run about the Hub and the disk."""
    if transfers is None:
        print("Downloads nothing: every shard that is read is on this disk")
        return
    shards = f"{transfers.num_shards:,} shard(s)"
    notes = [f"{transfers.num_parts:,} in part"] if transfers.num_parts else []
    if transfers.again_bytes:
        size = sizes.size(transfers.again_bytes)
        notes.append(f"{size} of it again, which a larger --cache-limit saves")
    print(f"Downloads {sizes.size(transfers.download_bytes)} of {shards}", end="")
    print(f" ({', '.join(notes)})" if notes else "")
    print(
        f"Disk      {sizes.size(output_bytes + transfers.cache_bytes)} at the most: the output "
        f"and {sizes.size(transfers.cache_bytes)} of shards"
    )


def transfers_json(transfers: Transfers | None, output_bytes: int) -> dict[str, Any]:
    """The same as plain data."""
    cache = transfers.cache_bytes if transfers else 0
    return {
        "download_bytes": transfers.download_bytes if transfers else 0,
        "download_shards": transfers.num_shards if transfers else 0,
        "download_parts": transfers.num_parts if transfers else 0,
        "download_again_bytes": transfers.again_bytes if transfers else 0,
        "cache_bytes": cache,
        "disk_bytes": output_bytes + cache,
    }


def say_traffic(outcome: "Outcome") -> None:
    """What was fetched, on stderr; nothing if nothing was."""
    say_downloads(outcome.traffic)


def say_downloads(traffic: "Traffic | None") -> None:
    """The same of what has no outcome."""
    if traffic is None:
        return
    parts = f", {traffic.num_parts:,} in part" if traffic.num_parts else ""
    again = f", {sizes.size(traffic.again_bytes)} of it again" if traffic.again_bytes else ""
    kept = f"; {traffic.num_kept:,} were left by an earlier run" if traffic.num_kept else ""
    render.note(
        f"Downloaded {sizes.size(traffic.downloaded_bytes)} in {traffic.num_downloads:,} "
        f"shard(s){parts}{again}{kept}; at most {sizes.size(traffic.peak_bytes)} at a time."
    )


def traffic_json(outcome: "Outcome") -> dict[str, Any]:
    """What was fetched, as a part of the answer; empty if nothing had to be."""
    return traffic_of(outcome.traffic)


def traffic_of(traffic: "Traffic | None") -> dict[str, Any]:
    """The same of what has no outcome."""
    if traffic is None:
        return {}
    return {"traffic": {name: getattr(traffic, name) for name in traffic.__slots__}}
