"""One command per merge method, made from the catalog: same options, same names, same help."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from drift_merge.cli import config_file, options, running
from drift_merge.cli.answers import describe_merge
from drift_merge.cli.planning import plan_run
from drift_merge.cli.running import CommandOptions
from drift_merge.cli.traffic import engine_options
from drift_merge.maths.methods import METHODS, Method
from drift_merge.maths.methods.options import INTERNAL, OPTION_HELP, RANDOM, method_options_of
from drift_merge.recipes.recipe import Recipe
from drift_merge.recipes.words import KEPT_LAYERS, LAYER_SWAP, TIES


def method_command(method: Method) -> click.Command:
    """The command of a method."""

    @click.pass_context
    def callback(ctx: click.Context, /, sources: tuple[str, ...], **values: Any) -> None:
        from drift_merge.cli.commands.methods import merge_action

        run = running.take_command_options(values)
        own = {name: values.pop(name) for name in method_options_of(method)}
        values["options"] = {name: value for name, value in own.items() if value is not None}
        reasoners, mllm = config_file.sources(ctx, sources)
        if config_file.wants_print(ctx):
            config_file.print_call(method.name, reasoners, mllm, values, run)
            return
        merge_action(method.name, reasoners, mllm, values, run)

    callback.__doc__ = _help(method)
    decorate = options.chain(
        click.command(name=method.name),
        click.argument("sources", nargs=-1, metavar=_metavar(method)),
        options.config,
        options.print_config,
        *_inputs(method),
        *_own_options(method),
        options.selection("attn,mlp,norm"),
        options.writing("source"),
        options.streaming,
        options.running,
    )
    command: click.Command = decorate(callback)
    return command


def _metavar(method: Method) -> str:
    return "REASONER MLLM" if method.reasoners == (1, 1) else "REASONER... MLLM"


def _inputs(method: Method) -> list[Callable[[Any], Any]]:
    found: list[Callable[[Any], Any]] = []
    if method.base != "none":
        need = "Common ancestor of reasoner and mllm"
        required = "" if method.base == "required" else "; then the method works on task vectors"
        found.append(click.option("--base", help=f"{need}{required}."))
    defaults = method.defaults[method.variants[0]]
    if "weight" in defaults:
        found.append(
            click.option(
                "--weight",
                "weights",
                multiple=True,
                metavar="W",
                help="Of the reasoners, one for all or one each: a number, attn=0.1,mlp=0.3, "
                f"[0,0.5,1] over the layers, or re:REGEX=0.2.  [default: {defaults['weight']:g}]",
            )
        )
    if any("mllm_weight" in values for values in method.defaults.values()):
        found.append(
            click.option(
                "--mllm-weight",
                metavar="W",
                help="Of the mllm itself, written as --weight.  [default: 1]",
            )
        )
    return found


def _own_options(method: Method) -> list[Callable[[Any], Any]]:
    found: list[Callable[[Any], Any]] = []
    if len(method.variants) > 1:
        notes = "".join(f"; {name}: {text}" for name, text in method.notes.items())
        found.append(
            click.option(
                "--variant",
                type=click.Choice(method.variants),
                help=f"Whose formula.  [default: {method.variants[0]}{notes}]",
            )
        )
    for name, kind in method_options_of(method).items():
        flag = name.replace("_", "-")
        shown = f"{OPTION_HELP[name]}  [default: {_default(method, name)}]"
        if kind is bool:
            found.append(click.option(f"--{flag}/--no-{flag}", default=None, help=shown))
        else:
            found.append(click.option(f"--{flag}", type=float, metavar="X", help=shown))
    if method.name.startswith(RANDOM):
        found.append(
            click.option(
                "--seed", type=int, default=0, show_default=True, metavar="N", help="Of the masks."
            )
        )
    if method.name == TIES:
        found.append(
            click.option(
                "--trim",
                type=click.Choice(["tensor", "global"]),
                default="tensor",
                show_default=True,
                help="One threshold per tensor, or one per task vector as in the paper.",
            )
        )
    if method.name == LAYER_SWAP:
        found += [
            click.option(
                "--keep-layers",
                default=KEPT_LAYERS,
                show_default=True,
                metavar="RANGES",
                help="Layers that stay the mllm's.",
            ),
            click.option(
                "--transition",
                type=click.IntRange(min=0),
                default=0,
                show_default=True,
                metavar="N",
                help="Layers beside the kept ones that get half the weight.",
            ),
        ]
    return found


def _default(method: Method, name: str) -> str:
    """The default of an option; by variant where variants differ."""
    values = {v: method.defaults[v].get(name) for v in method.variants}
    values = {v: value for v, value in values.items() if value is not None}
    shown = {v: _show(value) for v, value in values.items()}
    if not shown:
        return "must be given"
    if len(set(shown.values())) == 1:
        return next(iter(shown.values()))
    return ", ".join(f"{value} in {variant}" for variant, value in shown.items())


def _show(value: float | bool | None) -> str:
    return str(value).lower() if isinstance(value, bool) else f"{value:g}"


def _help(method: Method) -> str:
    base = " --base BASE" if method.base == "required" else ""
    reasoner = "REASONER" if method.reasoners[0] == 1 else "REASONER REASONER"
    return f"""Merge by {method.name}: {method.formula}.

    Source: {method.paper}. Everything outside the selected modules is the mllm's, byte for byte.

    \b
    Example:
        drift-merge {method.name} {reasoner} MLLM{base} -o merged/
    """


def methods_table(*, as_json: bool) -> None:
    """Print the catalog."""
    from dataclasses import asdict

    from drift_merge.cli.entry import print_json
    from drift_merge.cli.render import table

    if as_json:
        print_json({"schema": 1, "methods": [asdict(method) for method in METHODS.values()]})
        return
    rows = []
    for method in METHODS.values():
        least, most = method.reasoners
        number = str(least) if least == most else f"{least}+"
        defaults = ", ".join(
            f"{name} {_show(value)}"
            for name, value in method.defaults[method.variants[0]].items()
            if name not in INTERNAL
        )
        rows.append([method.name, method.base, number, "|".join(method.variants), defaults])
    table(["method", "base", "reasoners", "variants", "defaults"], rows)
    print()
    for method in METHODS.values():
        print(f"{method.name}\n    {method.formula}\n    {method.paper}")


def merge_action(
    method: str, reasoners: tuple[str, ...], mllm: str, values: dict[str, Any], run: CommandOptions
) -> None:
    """Make a merged checkpoint and say what was done."""
    from drift_merge.merges.make import make_merge

    out: Path = values.pop("output")
    recipe = Recipe(method=method, reasoners=reasoners, mllm=mllm, **values)
    prepared, plan, transfers = plan_run(recipe, out, run)
    if run.dry_run:
        return
    with engine_options(run, plan.write_bytes, transfers) as options:
        made = make_merge(prepared, plan, out, options)
    describe_merge(made, plan, out, run)


@click.command()
@options.json_option
def methods(as_json: bool) -> None:
    """List the merge methods: formula, needs, defaults, paper.

    \b
    Example:
        drift-merge methods
    """
    methods_table(as_json=as_json)
