"""`drift-merge`: merges written as complete MLLM checkpoints."""

from pathlib import Path
from typing import Any, NoReturn

import click

from drift_merge.cli import entry, options
from drift_merge.cli.methods import method_command, methods_table
from drift_merge.cli.pull import locate, pull_merge
from drift_merge.cli.push import push_merge
from drift_merge.cli.run import run_command
from drift_merge.maths.catalog import METHODS

HELP = {"help_option_names": ["-h", "--help"]}


@click.group(cls=entry.Group, context_settings=HELP)
@click.version_option(package_name="drift_merge", prog_name="drift-merge")
def group() -> None:
    """Merge text LLMs into the language tower of a multimodal LLM.

    REASONER is a text LLM, MLLM a multimodal one of the same family. Each is a directory, a
    .safetensors file beside its config.json, or a Hub id org/name[@revision].
    """


for _method in METHODS.values():
    group.add_command(method_command(_method))
group.add_command(run_command)


@click.command()
@options.json_option
def methods(as_json: bool) -> None:
    """List the merge methods: formula, needs, defaults, paper.

    \b
    Example:
        drift-merge methods
    """
    methods_table(as_json=as_json)


@click.command()
@click.argument("recipe", type=options.PATH)
@click.option(
    "--set",
    "settings",
    multiple=True,
    required=True,
    metavar="NAME=VALUES",
    help="weight=0.05:0.5:0.05 (from, to, step) or density=0.1,0.2; several are combined.",
)
@click.option("-o", "--output", type=options.PATH, required=True, help="Directory of the outputs.")
@click.option("--budget", is_flag=True, help="Show the disk needed, and stop.")
@options.streaming
@options.running
def sweep(
    recipe: Path, settings: tuple[str, ...], output: Path, budget: bool, **values: Any
) -> None:
    """Make many merges of one recipe in a single pass over its inputs.

    \b
    Example:
        drift-merge sweep recipe.yaml --set weight=0.05:0.5:0.05 -o sweep/
    """
    from drift_merge.cli.sweep import sweep_action

    run = options.take_run(values)
    sweep_action(recipe, settings, {}, output, run, budget=budget)


@click.command("inspect")
@click.argument("merge", metavar="OUT")
@options.json_option
def inspect_merge(merge: str, as_json: bool) -> None:
    """Show how a merged checkpoint was made, from its manifest.

    OUT is a directory, or a Hub id org/name[@revision]; no tensor is fetched.

    \b
    Example:
        drift-merge inspect merged/
    """
    from drift_merge.cli.actions import inspect_merge_action

    inspect_merge_action(locate(merge, "MERGE", whole=False)[1], as_json=as_json)


@click.command("verify")
@click.argument("merge", metavar="OUT")
@click.option(
    "--reasoner",
    "reasoners",
    multiple=True,
    help="With --mllm: compute a random sample of tensors again; repeat in the merge's order.",
)
@click.option("--mllm", help="The multimodal model of the merge.")
@click.option("--base", help="For a merge that was made with one.")
@click.option("--map", "map_file", type=options.PATH, help="The --map that was used, if one was.")
@options.sampling
@options.streaming
@options.threads_option
@options.json_option
@options.quiet_option
def verify_merge(merge: str, **values: Any) -> None:
    """Re-read a merge: files, headers, fingerprints, finiteness; exit 1 names the first bad tensor.

    OUT is a directory, or a Hub id org/name[@revision].

    \b
    Example:
        drift-merge verify merged/
    """
    from drift_merge.cli.actions import verify_merge_action

    quiet = values["quiet"] or values["as_json"]
    verify_merge_action(locate(merge, "MERGE", quiet=quiet)[1], **values)


for _command in (methods, sweep, inspect_merge, verify_merge):
    group.add_command(_command)
group.add_command(push_merge)
group.add_command(pull_merge)


def main() -> NoReturn:
    """Entry point of `drift-merge`."""
    entry.run(group, "drift-merge")
