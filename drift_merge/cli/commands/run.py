"""`drift-merge run`: a recipe of ours, of mergekit's, or the manifest of an output."""

import copy
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from drift_merge.cli import config_file, options, running
from drift_merge.cli.commands import compute, methods
from drift_merge.cli.commands.methods import method_command
from drift_merge.errors import RecipeError
from drift_merge.maths.methods import METHODS
from drift_merge.recipes.recipe import Recipe
from drift_merge.recipes.words import PRIOR

if TYPE_CHECKING:
    from drift_merge.recipes.files import LoadedRecipe

_REQUEST = "drift_merge.request"
_DEFAULT = "  [default: "  # in the help of an option; here the recipe gives the default
_RUNNING = (*running.CommandOptions.__slots__, "output")


def _load(ctx: click.Context, _: click.Parameter, file: Path) -> Path:
    """Click callback: read the recipe; how it runs becomes the defaults of this command."""
    from drift_merge.recipes.files import read_recipe

    request = read_recipe(file)
    ctx.meta[_REQUEST] = request
    by_key = {key: p.name for p in ctx.command.params for key in config_file.long_names(p)}
    ctx.default_map = {
        str(by_key[key]): value
        for key, value in request.values.items()
        if by_key.get(key) in _RUNNING
    }
    return file


def _overrides() -> list[click.Parameter]:
    """Every option that shapes a recipe, once; without a default, which is the recipe's."""
    found: dict[str, click.Parameter] = {}
    for method in METHODS.values():
        for parameter in method_command(method).params:
            name = str(parameter.name)
            if isinstance(parameter, click.Option) and name not in found:
                found[name] = parameter
    shaping = [p for name, p in found.items() if name not in (*_RUNNING, "config", "print_config")]
    return [_as_override(copy.copy(parameter)) for parameter in shaping]


def _as_override(parameter: Any) -> click.Parameter:
    parameter.default, parameter.show_default, parameter.required = None, False, False
    parameter.help = parameter.help.partition(_DEFAULT)[0]
    if parameter.name == "variant":
        parameter.type = click.STRING  # the recipe knows which its method has
    if parameter.name == "dtype":
        parameter.type = click.Choice([*options.OUTPUT_DTYPES, *options.COMPRESSED_DTYPES])
    return parameter  # type: ignore[no-any-return]


def _given(ctx: click.Context) -> dict[str, Any]:
    """The flags of this call that shape the recipe, by their long names."""
    given: dict[str, Any] = {}
    for parameter in ctx.command.params:
        name = str(parameter.name)
        is_flag = ctx.get_parameter_source(name) == ParameterSource.COMMANDLINE
        if is_flag and name not in (*_RUNNING, "recipe", "print_config"):
            value = ctx.params[name]
            key = config_file.long_names(parameter)[0]
            given[key] = list(value) if isinstance(value, tuple) else value
    return given


@click.command(name="run")
@click.argument("recipe", type=options.PATH, is_eager=True, callback=_load, expose_value=False)
@click.option("--reasoner", multiple=True, help="In the place of the recipe's; repeat for several.")
@click.option("--mllm", help="In the place of the recipe's.")
@options.print_config
@click.option("-o", "--output", type=options.PATH, help="Directory to create.")
@options.streaming
@options.running
@click.pass_context
def run_command(ctx: click.Context, /, **values: Any) -> None:
    """Make what a recipe says; a flag overrides it.

    RECIPE is a YAML of ours (its keys are the options' long names), a YAML of mergekit's, or the
    manifest of an output (drift_merge.json, prior.json, or the directory that holds it), which
    is then made again.

    \b
    Example:
        drift-merge run recipe.yaml -o merged/
    """
    request = ctx.meta[_REQUEST]
    run = running.take_command_options(values)
    out: Path | None = values.pop("output")
    recipe = request.recipe(_given(ctx))
    if config_file.wants_print(ctx):
        config_file.print_recipe(recipe, out, run)
        return
    if out is None:
        raise RecipeError(
            f"{request.file} names no output.", remedy="Name the directory to create: -o OUT"
        )
    for note in () if run.quiet or run.as_json else request.notes:
        click.echo(note, err=True)
    run_action(request, recipe, out, run)


run_command.params += _overrides()


def run_action(
    request: "LoadedRecipe", recipe: Recipe, out: Path, run: running.CommandOptions
) -> None:
    """Make the output of a recipe, and warn of sources that have changed since its manifest."""

    if request.remade is not None:
        _warn_of_changes(request, recipe)
    values = {each.name: getattr(recipe, each.name) for each in fields(Recipe)}
    for name in ("method", "reasoners", "mllm"):
        values.pop(name)
    values["output"] = out
    if recipe.method == PRIOR:
        compute.compute_action(recipe.reasoners, recipe.mllm, values, run)
    elif recipe.options.get("is_delta"):
        _apply(recipe, out, run)
    else:
        methods.merge_action(recipe.method, recipe.reasoners, recipe.mllm, values, run)


def _apply(recipe: Recipe, out: Path, run: running.CommandOptions) -> None:
    from drift_merge.cli.commands.apply import apply_action

    values = {"output": out, "dtype": recipe.dtype, "max_shard_size": recipe.max_shard_size}
    values["allow_nonfinite"] = recipe.allow_nonfinite
    scale = float(recipe.options.get("scale", 0.1))
    apply_action(recipe.reasoners[0], recipe.mllm, scale, values, run)


def _warn_of_changes(request: "LoadedRecipe", recipe: Recipe) -> None:
    from drift_merge.plans.prepare import changed_sources, prepare

    assert request.remade is not None
    prepared = prepare(recipe, headers_only=True, quiet=True)
    for warning in changed_sources(request.remade.layouts, prepared, request.file.name):
        click.echo(warning, err=True)
