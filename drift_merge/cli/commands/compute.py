"""NEW FILE."""

import shlex
from pathlib import Path
from typing import Any

import click

from drift_merge.cli import config_file, options, render, running
from drift_merge.cli.answers import _one_reasoner, _print_formula, _print_made, say_done
from drift_merge.cli.planning import plan_run
from drift_merge.cli.running import CommandOptions
from drift_merge.cli.traffic import engine_options
from drift_merge.recipes.recipe import Recipe


def compute_action(
    reasoners: tuple[str, ...], mllm: str, values: dict[str, Any], run: CommandOptions
) -> None:
    """Compute a prior and print its table."""
    from drift_merge.priors.compute import compute_prior

    _one_reasoner(reasoners)
    out: Path = values.pop("output")
    recipe = Recipe(method="prior", reasoners=reasoners, mllm=mllm, **values)
    prepared, plan, transfers = plan_run(recipe, out, run)
    if run.dry_run:
        return
    with engine_options(run, plan.write_bytes, transfers) as options:
        made = compute_prior(prepared, plan, out, options)
    manifest = made.prior.manifest
    if run.as_json:
        _print_made(out, manifest, made.outcome)
        return
    if run.quiet:
        print(out)
        return
    _print_formula(manifest)
    sentence = render.prior_table(made.prior.tensors)
    print(sentence)
    say_done(out, plan, made.outcome)
    arguments = f"--reasoner {shlex.quote(reasoners[0])} --mllm {shlex.quote(mllm)}"
    base = f" --base {shlex.quote(recipe.base)}" if recipe.base else ""
    streamed = " --stream" if run.stream else ""
    render.note(f"Next: drift-prior verify {shlex.quote(str(out))} {arguments}{base}{streamed}")


@click.command()
@click.argument("sources", nargs=-1, metavar="REASONER MLLM")
@options.config
@options.print_config
@click.option("--base", help="Common ancestor; then delta = reasoner - base.")
@options.selection("attn,mlp")
@options.writing("bfloat16", *options.COMPRESSED_DTYPES)
@click.option(
    "--through",
    type=click.Choice(options.OUTPUT_DTYPES),
    help="Round delta to this dtype before it is compressed, as a prior of that dtype was.",
)
@options.streaming
@options.running
@click.pass_context
def compute(ctx: click.Context, /, sources: tuple[str, ...], **values: Any) -> None:
    """Stream delta = theta_reasoner - theta_mllm to safetensors shards.

    \b
    Example:
        drift-prior compute REASONER MLLM -o prior/
    """
    from drift_merge.cli.commands.compute import compute_action

    run = running.take_command_options(values)
    reasoners, mllm = config_file.sources(ctx, sources)
    if config_file.wants_print(ctx):
        config_file.print_call("prior", reasoners, mllm, values, run)
        return
    compute_action(reasoners, mllm, values, run)
