"""One command per merge method, made from the catalog: same options, same names, same help."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from drift_merge.cli import config_file, options, render, running
from drift_merge.cli.answers import describe_merge
from drift_merge.cli.entry import print_json
from drift_merge.cli.planning import plan_run
from drift_merge.cli.running import CommandOptions
from drift_merge.cli.traffic import engine_options
from drift_merge.maths.methods import METHODS, Method
from drift_merge.maths.methods.table import WEIGHTS
from drift_merge.merges.make import make_merge
from drift_merge.recipes.recipe import Recipe


def method_command(method: Method) -> click.Command:
    """The command of a method."""

    @click.pass_context
    def callback(
        ctx: click.Context, /, sources: tuple[str, ...], output: Path, **values: Any
    ) -> None:
        run = running.take_command_options(values)
        values = options.values_of(method, values)
        recipe = config_file.recipe_of(ctx, method.name, sources, values)
        if config_file.wants_print(ctx):
            config_file.print_recipe(recipe, output, run)
        else:
            merge_action(recipe, output, run)

    callback.__doc__ = _help(method)
    decorate = options.chain(
        click.command(name=method.name),
        click.argument("sources", nargs=-1, metavar=_metavar(method)),
        options.config,
        options.print_config,
        options.of_method(method),
        options.selection(method.name),
        options.writing(method.name),
        options.streaming,
        options.running,
    )
    command: click.Command = decorate(callback)
    return command


def _metavar(method: Method) -> str:
    return "REASONER MLLM" if method.reasoners == (1, 1) else "REASONER... MLLM"


def _help(method: Method) -> str:
    base = " --base BASE" if method.base == "required" else ""
    reasoner = "REASONER" if method.reasoners[0] == 1 else "REASONER REASONER"
    summary = method.summary[0].upper() + method.summary[1:]
    return f"""{summary}.

    {method.formula}

    Source: {method.paper}. Everything outside the selected modules is the mllm's, byte for byte.

    Guide: drift-merge guide methods

    \b
    Example:
        drift-merge {method.name} {reasoner} MLLM{base} -o merged/
    """


def merge_action(recipe: Recipe, out: Path, run: CommandOptions) -> None:
    """Make a merged checkpoint and say what was done."""
    prepared, plan, transfers = plan_run(recipe, out, run)
    if run.dry_run:
        return
    with engine_options(run, plan.write_bytes, transfers) as how:
        made = make_merge(prepared, plan, out, how)
    describe_merge(made, plan, out, run)


@click.command()
@options.json_option
def methods(as_json: bool) -> None:
    """List the merge methods: formula, needs, defaults, paper.

    \b
    Example:
        drift-merge methods
    """
    if as_json:
        print_json({"schema": 1, "methods": [_as_data(method) for method in METHODS.values()]})
        return
    rows = []
    for method in METHODS.values():
        least, most = method.reasoners
        number = str(least) if least == most else f"{least}+"
        defaults = ", ".join(
            f"{name} {options.show(value)}"
            for name, value in method.defaults[method.variants[0]].items()
            if name in WEIGHTS or not method.option(name).is_internal
        )
        rows.append([method.name, method.base, number, "|".join(method.variants), defaults])
    render.table(["method", "base", "reasoners", "variants", "defaults"], rows)
    print()
    for method in METHODS.values():
        print(f"{method.name}: {method.summary}\n    {method.formula}\n    {method.paper}")


def _as_data(method: Method) -> dict[str, Any]:
    """A row of the table as JSON, but what only a user's own method has."""
    row = asdict(method)
    return {key: row[key] for key in row if key not in ("own_options", "source")}
