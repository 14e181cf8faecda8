"""`drift-merge run`: a recipe of ours, of mergekit's, or the manifest of an output."""

from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from drift_merge.cli import config_file, options, running
from drift_merge.cli.commands.apply import apply_action
from drift_merge.cli.commands.compute import compute_action
from drift_merge.cli.commands.methods import merge_action
from drift_merge.cli.running import CommandOptions
from drift_merge.errors import RecipeError
from drift_merge.merges.apply import applied_again
from drift_merge.plans.prepare import changed_sources, prepare
from drift_merge.recipes.files import LoadedRecipe, read_recipe
from drift_merge.recipes.own_methods import load_methods
from drift_merge.recipes.recipe import Recipe
from drift_merge.recipes.words import PRIOR

_LOADED = "drift_merge.recipe"
_RUNNING = (*CommandOptions.__slots__, "output", "methods_file", "recipe", "print_config")


def _load(ctx: click.Context, _: click.Parameter, file: Path) -> Path:
    """Click callback: read the recipe; how it runs becomes the defaults of this command."""
    loaded = read_recipe(file, load_methods(ctx.params.get("methods_file")))
    ctx.meta[_LOADED] = loaded
    by_key = {key: p.name for p in ctx.command.params for key in config_file.long_names(p)}
    ctx.default_map = {
        str(by_key[key]): value
        for key, value in loaded.values.items()
        if by_key.get(key) in _RUNNING
    }
    return file


def _given(ctx: click.Context) -> dict[str, Any]:
    """The flags of this call that shape the recipe, by their long names."""
    given: dict[str, Any] = {}
    for parameter in ctx.command.params:
        name = str(parameter.name)
        is_flag = ctx.get_parameter_source(name) == ParameterSource.COMMANDLINE
        if is_flag and name not in _RUNNING:
            value = ctx.params[name]
            key = config_file.long_names(parameter)[0]
            given[key] = list(value) if isinstance(value, tuple) else value
    return given


@click.command(name="run")
@click.option(
    "--methods",
    "methods_file",
    type=options.PATH,
    is_eager=True,
    help="Python file with merge methods of your own.",
)
@click.argument("recipe", type=options.PATH, callback=_load, expose_value=False)
@click.option("--reasoner", multiple=True, help="In the place of the recipe's; repeat for several.")
@click.option("--mllm", help="In the place of the recipe's.")
@options.print_config
@click.option("-o", "--output", type=options.PATH, help="Directory to create.")
@options.streaming
@options.running
@options.every()
@click.pass_context
def run_command(ctx: click.Context, /, **values: Any) -> None:
    """Make what a recipe says; a flag overrides it.

    RECIPE is a YAML of ours (its keys are the options' long names), a YAML of mergekit's, or the
    manifest of an output (drift_merge.json, prior.json, or the directory that holds it), which
    is then made again.

    Guide: drift-merge guide recipes

    \b
    Example:
        drift-merge run recipe.yaml -o merged/
    """
    loaded: LoadedRecipe = ctx.meta[_LOADED]
    run, out = running.take_command_options(values), values["output"]
    recipe = loaded.recipe(_given(ctx))
    if config_file.wants_print(ctx):
        config_file.print_recipe(recipe, out, run)
        return
    if out is None:
        raise RecipeError(
            f"{loaded.file} names no output.", remedy="Name the directory to create: -o OUT"
        )
    for note in () if run.quiet or run.as_json else loaded.notes:
        click.echo(note, err=True)
    run_action(loaded, recipe, out, run)


def run_action(loaded: LoadedRecipe, recipe: Recipe, out: Path, run: CommandOptions) -> None:
    """Make the output of a recipe, and warn of sources that have changed since its manifest."""
    if loaded.remade is not None:
        prepared = prepare(recipe, headers_only=True, quiet=True)
        for warning in changed_sources(loaded.remade.layouts, prepared, loaded.file.name):
            click.echo(warning, err=True)
    if recipe.method == PRIOR:
        compute_action(recipe, out, run)
    elif recipe.options.get("is_delta"):
        apply_action(recipe.reasoners[0], recipe.mllm, out, run, **applied_again(recipe))
    else:
        merge_action(recipe, out, run)
