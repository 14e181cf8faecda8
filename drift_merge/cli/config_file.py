"""`--config FILE` takes options from a file; `--print-config` prints them for one.

Keys are the options' long names, plus `method`, `reasoner` and `mllm`. A flag overrides the file.
One file serves several commands: a key of another command is named on stderr and has no effect.
"""

import sys
from pathlib import Path
from typing import Any

import click

from drift_merge.cli.running import CommandOptions
from drift_merge.errors import RecipeError
from drift_merge.recipes.files import absolute, read_recipe
from drift_merge.recipes.recipe import Recipe
from drift_merge.recipes.values import to_values
from drift_merge.recipes.words import DEFAULT_CACHE_SIZE
from drift_merge.recipes.yaml import write_mapping
from drift_merge.storage.ranks.environment import own_cores

METHOD = "method"  # for `drift-merge run`; elsewhere the command is the method
SOURCES = ("reasoner", "mllm")
_META = "drift_merge.config"
_PRINT = "drift_merge.print_config"


def load(ctx: click.Context, _: click.Parameter, file: Path | None) -> None:
    """Click callback: read the file and make it the defaults of this command."""
    if file is None:
        return
    values = read_recipe(file).values
    names = {name: parameter for parameter in ctx.command.params for name in long_names(parameter)}
    own = (*SOURCES, *([METHOD] if values.get(METHOD) in (ctx.info_name, "prior") else []))
    foreign = [key for key in values if key not in names and key not in own]
    if foreign:
        click.echo(f"{file}: no option of {ctx.info_name}, ignored: {', '.join(foreign)}", err=True)
    ctx.default_map = {
        str(names[key].name): _as_given(value, names[key])
        for key, value in values.items()
        if key in names
    }
    ctx.meta[_META] = {key: values[key] for key in SOURCES if key in values}


def _as_given(value: Any, parameter: click.Parameter) -> Any:
    """A value in the form the option takes: a list where it repeats, else text with commas."""
    if parameter.multiple:
        return value if isinstance(value, list) else [value]
    return ",".join(map(str, value)) if isinstance(value, list) else value


def long_names(parameter: click.Parameter) -> list[str]:
    """The long names of an option, without dashes; [] for an argument."""
    return [option.lstrip("-") for option in parameter.opts if option.startswith("--")]


def sources(ctx: click.Context, given: tuple[str, ...]) -> tuple[tuple[str, ...], str]:
    """The reasoners and the mllm, from the arguments or else from the config file.

    Raises:
        RecipeError: fewer than two sources are named.
    """
    if not given:
        config = ctx.meta.get(_META, {})
        reasoner = config.get("reasoner", ())
        reasoners = (reasoner,) if isinstance(reasoner, str) else tuple(reasoner)
        given = (*reasoners, *([config["mllm"]] if "mllm" in config else []))
    if len(given) < 2:
        got = f"only {given[0]!r}" if given else "nothing"
        raise RecipeError(
            f"two sources are needed, REASONER and MLLM; got {got}.",
            remedy=f"The text LLM comes first: {ctx.command_path} REASONER MLLM",
        )
    return tuple(map(str, given[:-1])), str(given[-1])


def remember_print(ctx: click.Context, _: click.Parameter, value: bool) -> None:
    """Click callback of `--print-config`."""
    ctx.meta[_PRINT] = value


def wants_print(ctx: click.Context) -> bool:
    """Whether the call shall only be printed."""
    return bool(ctx.meta.get(_PRINT))


def require_output(ctx: click.Context, parameter: click.Parameter, value: Any) -> Any:
    """Click callback of `-o`: it is required, but not to print the call."""
    if value is None and not wants_print(ctx):
        raise click.MissingParameter(ctx=ctx, param=parameter)
    return value


def recipe_of(
    ctx: click.Context, method: str, given: tuple[str, ...], values: dict[str, Any]
) -> Recipe:
    """The recipe of a call.

    Args:
        ctx: of the command.
        method: "prior" or a merge method.
        given: the sources among the arguments.
        values: the other fields of `Recipe`.

    Raises:
        RecipeError: fewer than two sources are named, or an option is wrong.
    """
    reasoners, mllm = sources(ctx, given)
    return Recipe(method=method, reasoners=reasoners, mllm=mllm, **values)


def print_recipe(recipe: Recipe, out: Path | None, run: CommandOptions) -> None:
    """Print a recipe as YAML on stdout: `drift-merge run` makes the same of it from anywhere."""
    values = to_values(recipe)
    running = {
        "output": None if out is None else str(out),
        "device": run.device if run.device != "cpu" else None,
        "threads": run.threads if run.threads != own_cores() else None,
        "overwrite": run.overwrite or None,
        "stream": run.stream or None,
        "cache-limit": run.cache_limit if run.cache_limit != DEFAULT_CACHE_SIZE else None,
    }
    values |= {key: value for key, value in running.items() if value is not None}
    sys.stdout.write(write_mapping(absolute(values)))
