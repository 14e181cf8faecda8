"""`drift-prior combine`: priors of one MLLM added up, negated, restricted, made orthogonal."""

import shlex
from pathlib import Path
from typing import Any

import click

from drift_merge.cli import answers, options, render, running
from drift_merge.cli.commands.pull import locate
from drift_merge.cli.entry import print_json
from drift_merge.cli.traffic import engine_options
from drift_merge.engine.job import check_plan
from drift_merge.priors.combine import combine_priors, plan_combination
from drift_merge.priors.manifest import open_prior
from drift_merge.priors.summary import stored_sentence


@click.command("combine")
@click.argument("priors", nargs=-1, required=True, metavar="PRIOR...")
@options.output_option
@click.option(
    "--weight",
    "weights",
    type=float,
    multiple=True,
    metavar="W",
    help="Of each prior, in their order; negative to negate.  [default: 1]",
)
@click.option(
    "--orthogonal", is_flag=True, help="The first prior without its part along the second."
)
@click.option("--modules", metavar="LIST", help="Only these of the first prior's: attn,mlp.")
@click.option("--layers", metavar="RANGES", help="Only these layers, such as 0:14.")
@click.option(
    "--dtype",
    type=click.Choice((*options.COMPRESSED_DTYPES, *options.OUTPUT_DTYPES)),
    default="bfloat16",
    show_default=True,
    help="Of the output.",
)
@options.rank_options
@options.shard_size_option
@options.running
def combine(priors: tuple[str, ...], output: Path, **values: Any) -> None:
    """Add up priors of one MLLM into a prior: sum of weight * delta, tensor by tensor.

    PRIOR is a directory, or a Hub id org/name[@revision]. One prior alone is scaled, negated or
    restricted. The priors must hold the same selected tensors of the same MLLM.

    Guide: drift-prior guide priors

    \b
    Example:
        drift-prior combine math/ code/ --weight 0.7 --weight 0.3 -o both/
        drift-prior combine math/ code/ --orthogonal --rank 16 -o math-alone/
        drift-prior combine math/ --weight -1 --layers 0:14 -o against/
    """
    run = running.take_command_options(values)
    silent = run.quiet or run.as_json
    opened = [open_prior(locate(text, "PRIOR", quiet=silent)[1]) for text in priors]
    plan = plan_combination(opened, threads=run.threads, **values)
    check_plan(plan, output, overwrite=run.overwrite)
    if run.dry_run:
        _print_plan(plan, run)
        return
    command = _command(priors, plan.recipe.parameters(), values)
    with engine_options(run, plan.write_bytes) as how:
        made = combine_priors(opened, plan, command, output, how)
    manifest = made.prior.manifest
    if run.as_json:
        shown = {k: v for k, v in manifest.items() if k != "coefficients"}
        print_json({"schema": 1, "output": str(output), **answers.without_tensors(shown)})
    elif run.quiet:
        print(output)
    else:
        print(render.prior_table(manifest))
        print(stored_sentence(made.prior.tensors))
        answers.say_done(output, plan, made.outcome)
        render.note(f"Next: drift-prior inspect {shlex.quote(str(output))}")


def _command(priors: tuple[str, ...], recipe: dict[str, Any], values: dict[str, Any]) -> str:
    """What makes it again, without where it is written."""
    words = ["drift-prior", "combine", *priors]
    words += [word for weight in values["weights"] for word in ("--weight", str(weight))]
    words += ["--orthogonal"] if values["orthogonal"] else []
    for name in ("modules", "layers", "dtype"):
        words += [f"--{name}", str(values[name])] if values[name] is not None else []
    if recipe.get("rank"):
        words += ["--rank", str(recipe["rank"]), "--norm", str(recipe["norm"])]
    return f"{shlex.join(words)} -o DIR"


def _print_plan(plan: Any, run: running.CommandOptions) -> None:
    if run.as_json:
        print_json(render.plan_json(plan, verbose=run.verbose))
        return
    render.plan_summary(plan)
    if run.verbose:
        render.plan_steps(plan)
    render.note("Nothing was written (--dry-run).")
