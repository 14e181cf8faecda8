"""`verify` of both programs: read an artifact again, and compute a sample of it anew."""

import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from drift_merge.artifacts.checks import TOLERANCE
from drift_merge.cli import options
from drift_merge.cli.commands.pull import locate
from drift_merge.cli.entry import print_json, ranks_of_command
from drift_merge.cli.progress import progress
from drift_merge.merges.manifest import open_merge
from drift_merge.merges.verify import verify_merge
from drift_merge.priors.manifest import open_prior
from drift_merge.priors.verify import verify_prior
from drift_merge.storage import sizes


def verify_prior_action(path: Path, *, as_json: bool, quiet: bool, **values: Any) -> None:
    """Verify a prior and say what was checked."""

    prior = open_prior(path)
    _verify(verify_prior, prior, prior.manifest, values, as_json=as_json, quiet=quiet)


def verify_merge_action(path: Path, *, as_json: bool, quiet: bool, **values: Any) -> None:
    """Verify a merge and say what was checked."""

    merge = open_merge(path)
    _verify(verify_merge, merge, merge.manifest, values, as_json=as_json, quiet=quiet)


def _verify(
    check: Any,
    artifact: Any,
    manifest: Mapping[str, Any],
    values: dict[str, Any],
    *,
    as_json: bool,
    quiet: bool,
) -> None:
    ranks = ranks_of_command()
    seed = values["seed"] if values["seed"] is not None else secrets.randbelow(2**31)
    how = {"seed": ranks.share(seed), "ranks": ranks}
    with (
        progress("Verifying", manifest["size_bytes"], quiet=quiet or as_json) as advance,
        ranks.failing_together(),
    ):
        report = check(artifact, **values | how, progress=ranks.count_progress(advance))
        ranks.wait()
    if as_json:
        value = {"schema": 1, "ok": True, "tensors": report.num_tensors}
        value |= {"bytes": report.size_bytes, "recomputed": list(report.recomputed)}
        print_json(value | ({"near": list(report.near)} if report.near else {}))
        return
    print(
        f"OK: {report.num_tensors:,} tensors, {sizes.size(report.size_bytes)}: "
        "files, headers, fingerprints and finiteness."
    )
    if report.recomputed:
        equal = len(report.recomputed) - len(report.near)
        print(f"Computed again from the sources, equal: {equal} (seed {seed}).")
    if report.near:
        print(
            f"Equal within {TOLERANCE:.0%} of what their singular directions hold, as made on "
            f"another processor: {len(report.near)}."
        )


@click.command("verify")
@click.argument("prior")
@click.option("--reasoner", help="With --mllm: compute a random sample of tensors again.")
@click.option("--mllm", help="The model that the prior was computed against.")
@click.option("--base", help="For a prior that was computed with one.")
@click.option("--map", "map_file", type=options.PATH, help="The --map that was used, if one was.")
@options.sampling
@options.streaming
@options.threads_option
@options.json_option
@options.quiet_option
def of_prior(prior: str, **values: Any) -> None:
    """Re-read a prior: files, headers, fingerprints, finiteness; exit 1 names the first bad tensor.

    PRIOR is a directory, or a Hub id org/name[@revision].

    Guide: drift-prior guide priors

    \b
    Example:
        drift-prior verify prior/ --reasoner REASONER --mllm MLLM
    """

    quiet = values["quiet"] or values["as_json"]
    verify_prior_action(locate(prior, "PRIOR", quiet=quiet)[1], **values)


@click.command("verify")
@click.argument("merge", metavar="OUT")
@click.option(
    "--reasoner",
    "reasoners",
    multiple=True,
    help="With --mllm: compute a random sample of tensors again; repeat in the merge's order.",
)
@click.option("--mllm", help="The multimodal model of the merge.")
@click.option("--base", help="For a merge that was made with one.")
@click.option("--map", "map_file", type=options.PATH, help="The --map that was used, if one was.")
@options.methods_file
@options.sampling
@options.streaming
@options.threads_option
@options.json_option
@options.quiet_option
def of_merge(merge: str, **values: Any) -> None:
    """Re-read a merge: files, headers, fingerprints, finiteness; exit 1 names the first bad tensor.

    OUT is a directory, or a Hub id org/name[@revision].

    Guide: drift-merge guide merging

    \b
    Example:
        drift-merge verify merged/
    """

    quiet = values["quiet"] or values["as_json"]
    verify_merge_action(locate(merge, "MERGE", quiet=quiet)[1], **values)
