"""`drift-prior compute`: stream delta to safetensors shards."""

import shlex
from pathlib import Path
from typing import Any

import click

from drift_merge.cli import config_file, options, render, running
from drift_merge.cli.answers import print_formula, print_made, say_done
from drift_merge.cli.planning import plan_run
from drift_merge.cli.running import CommandOptions
from drift_merge.cli.traffic import engine_options
from drift_merge.priors.compute import compute_prior
from drift_merge.recipes.recipe import Recipe
from drift_merge.recipes.words import PRIOR


@click.command()
@click.argument("sources", nargs=-1, metavar="REASONER MLLM")
@options.config
@options.print_config
@options.recipe(PRIOR, "base")
@options.selection(PRIOR)
@options.writing(PRIOR)
@options.streaming
@options.running
@click.pass_context
def compute(ctx: click.Context, /, sources: tuple[str, ...], output: Path, **values: Any) -> None:
    """Stream delta = theta_reasoner - theta_mllm to safetensors shards.

    Guide: drift-prior guide priors

    \b
    Example:
        drift-prior compute REASONER MLLM -o prior/
    """
    run = running.take_command_options(values)
    recipe = config_file.recipe_of(ctx, PRIOR, sources, values)
    if config_file.wants_print(ctx):
        config_file.print_recipe(recipe, output, run)
    else:
        compute_action(recipe, output, run)


def compute_action(recipe: Recipe, out: Path, run: CommandOptions) -> None:
    """Compute a prior and print its table."""

    prepared, plan, transfers = plan_run(recipe, out, run)
    if run.dry_run:
        return
    with engine_options(run, plan.write_bytes, transfers) as how:
        made = compute_prior(prepared, plan, out, how)
    manifest = made.prior.manifest
    if run.as_json:
        print_made(out, manifest, made.outcome)
        return
    if run.quiet:
        print(out)
        return
    print_formula(manifest)
    print(render.prior_table(manifest))
    say_done(out, plan, made.outcome)
    words = ["drift-prior", "verify", str(out), "--reasoner", recipe.reasoners[0]]
    words += ["--mllm", recipe.mllm, *(["--base", recipe.base] if recipe.base else [])]
    words += ["--map", str(recipe.map_file)] if recipe.map_file else []
    render.note(f"Next: {shlex.join([*words, *(['--stream'] if run.stream else [])])}")
