"""`drift-prior compress`: a prior on disk in 8 bits, or by factors of low rank."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from drift_merge.cli import answers, options, render, running
from drift_merge.cli.commands.pull import locate
from drift_merge.cli.entry import print_json
from drift_merge.cli.traffic import engine_options
from drift_merge.engine.job import check_plan
from drift_merge.priors.compress import compress_prior, compress_recipe, plan_compression
from drift_merge.priors.manifest import open_prior
from drift_merge.priors.summary import stored_sentence
from drift_merge.storage.sizes import size

if TYPE_CHECKING:
    from drift_merge.plans.plan import Plan
    from drift_merge.priors.manifest import Prior


@click.command(name="compress")
@click.argument("prior")
@options.output_option
@click.option(
    "--dtype",
    type=click.Choice((*options.COMPRESSED_DTYPES, *options.OUTPUT_DTYPES)),
    help="8 bits with a float32 scale per row; with --rank that of the factors, default bfloat16.",
)
@options.rank_options
@options.shard_size_option
@options.running
def compress_command(prior: str, output: Path, **values: Any) -> None:
    """Store a prior in 8 bits, with a scale for each row, or as factors of low rank.

    PRIOR is a directory, or a Hub id org/name[@revision]. What is kept of every delta is measured,
    and stated in the manifest.

    Guide: drift-prior guide compression

    \b
    Example:
        drift-prior compress prior/ --dtype int8 -o prior-int8/
        drift-prior compress prior/ --rank 16 -o prior-r16/
    """
    run = running.take_command_options(values)
    compress_action(prior, output, run, **values)


def compress_action(text: str, out: Path, run: running.CommandOptions, **values: Any) -> None:
    """Compress a prior and print what is kept of it."""

    prior = open_prior(locate(text, "PRIOR", quiet=run.quiet or run.as_json)[1])
    plan = plan_compression(prior, compress_recipe(prior, **values))
    check_plan(plan, out, overwrite=run.overwrite)
    if run.dry_run:
        _print_plan(plan, run)
        return
    with engine_options(run, plan.write_bytes) as how:
        made = compress_prior(prior, plan, out, how)
    manifest = made.prior.manifest
    if run.as_json:
        print_json({"schema": 1, "output": str(out), **answers.without_tensors(manifest)})
    elif run.quiet:
        print(out)
    else:
        _print_sizes(prior, made.prior)
        print(stored_sentence(made.prior.tensors))
        answers.say_done(out, plan, made.outcome)
        render.note(f"Next: drift-prior verify {shlex.quote(str(out))}")


def _print_plan(plan: "Plan", run: running.CommandOptions) -> None:

    if run.as_json:
        print_json(render.plan_json(plan, verbose=run.verbose))
        return
    render.plan_summary(plan)
    if run.verbose:
        render.plan_steps(plan)
    render.note("Nothing was written (--dry-run).")


def _print_sizes(before: "Prior", after: "Prior") -> None:

    num_bytes = [prior.manifest["size_bytes"] for prior in (before, after)]
    stored = [prior.manifest["parameters"] for prior in (before, after)]
    names = [p["dtype"] + (f" rank {p['rank']}" if p.get("rank") else "") for p in stored]
    share = num_bytes[1] / max(num_bytes[0], 1)
    said = f"{share:.0%}" if share > 0.1 else f"{share:.2%}"  # of low rank it is tiny
    print(f"{names[0]} {size(num_bytes[0])} -> {names[1]} {size(num_bytes[1])} ({said})")
