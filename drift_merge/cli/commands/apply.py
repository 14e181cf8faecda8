"""`drift-prior apply`: mllm + scale * delta as a complete checkpoint."""

from pathlib import Path
from typing import Any

import click

from drift_merge.cli import options, running
from drift_merge.cli.answers import describe_merge
from drift_merge.cli.commands.pull import locate
from drift_merge.cli.planning import plan_run
from drift_merge.cli.running import CommandOptions
from drift_merge.cli.traffic import engine_options
from drift_merge.maths.methods.table import SPECTRAL
from drift_merge.merges.apply import apply_prior, apply_recipe
from drift_merge.priors.manifest import open_prior


@click.command()
@click.argument("prior")
@click.argument("mllm")
@click.option(
    "--scale",
    type=float,
    default=0.1,
    show_default=True,
    metavar="X",
    help="Factor of delta; 1 gives the reasoner's weights.",
)
@options.of_step("inject")
@options.writing("inject")
@options.streaming
@options.running
def apply(prior: str, mllm: str, scale: float, output: Path, **values: Any) -> None:
    """Write mllm + scale * delta as a complete MLLM checkpoint.

    PRIOR is a directory, or a Hub id org/name[@revision].

    Guide: drift-prior guide priors

    \b
    Example:
        drift-prior apply prior/ MLLM --scale 0.1 -o merged/
    """

    run = running.take_command_options(values)
    given = {name: values.pop(name) for name in SPECTRAL}
    step = {name: value for name, value in given.items() if value is not None}
    apply_action(prior, mllm, output, run, scale=scale, options=step, **values)


def apply_action(text: str, mllm: str, out: Path, run: CommandOptions, **values: Any) -> None:
    """Write mllm + scale * delta and say what was done; the prior may be on the Hub."""

    silent = run.quiet or run.as_json or run.dry_run
    place, path = locate(text, "PRIOR", whole=not run.dry_run, quiet=silent)
    prior = open_prior(path)
    recipe = apply_recipe(place, prior.manifest, mllm, **values)
    prepared, plan, transfers = plan_run(recipe, out, run)
    if run.dry_run:
        return
    with engine_options(run, plan.write_bytes, transfers) as how:
        made = apply_prior(prior.manifest, prepared, plan, out, how)
    describe_merge(made, plan, out, run)
