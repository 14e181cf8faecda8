"""`drift-merge`: merges written as complete MLLM checkpoints."""

from pathlib import Path
from typing import Any, NoReturn

import click

from drift_merge.cli import config_file, entry, options

HELP = {"help_option_names": ["-h", "--help"]}


@click.group(cls=entry.Group, context_settings=HELP)
@click.version_option(package_name="drift_merge", prog_name="drift-merge")
def group() -> None:
    """Merge text LLMs into the language tower of a multimodal LLM.

    REASONER is a text LLM, MLLM a multimodal one of the same family. Each is a directory, a
    .safetensors file beside its config.json, or a Hub id org/name[@revision].
    """


@group.command()
@click.argument("sources", nargs=-1, metavar="REASONER... MLLM")
@options.config
@click.option(
    "--weight",
    "weights",
    type=float,
    multiple=True,
    metavar="W",
    help="Of the reasoners: one for all, or one each in their order.  [default: 0.1]",
)
@options.selection("attn,mlp,norm")
@options.writing("source")
@options.running
@click.pass_context
def linear(ctx: click.Context, /, sources: tuple[str, ...], **values: Any) -> None:
    """(1 - sum(w)) * mllm + sum(w_i * reasoner_i), over the selected modules of the tower.

    Everything else is the mllm's, byte for byte; weight 0 gives the mllm back.

    \b
    Example:
        drift-merge linear REASONER MLLM --weight 0.1 -o merged/
    """
    from drift_merge.cli.actions import merge_action

    run = options.take_run(values)
    reasoners, mllm = config_file.sources(ctx, sources)
    merge_action("linear", reasoners, mllm, values, run)


@group.command()
@click.argument("merge", type=options.PATH, metavar="OUT")
@options.json_option
def inspect(merge: Path, as_json: bool) -> None:
    """Show how a merged checkpoint was made, from its manifest.

    \b
    Example:
        drift-merge inspect merged/
    """
    from drift_merge.cli.actions import inspect_merge_action

    inspect_merge_action(merge, as_json=as_json)


@group.command()
@click.argument("merge", type=options.PATH, metavar="OUT")
@click.option(
    "--reasoner",
    "reasoners",
    multiple=True,
    help="With --mllm: compute a random sample of tensors again; repeat in the merge's order.",
)
@click.option("--mllm", help="The multimodal model of the merge.")
@click.option("--map", "map_file", type=options.PATH, help="The --map that was used, if one was.")
@options.sampling
@options.threads_option
@options.json_option
@options.quiet_option
def verify(merge: Path, **values: Any) -> None:
    """Re-read a merge: files, headers, fingerprints, finiteness; exit 1 names the first bad tensor.

    \b
    Example:
        drift-merge verify merged/
    """
    from drift_merge.cli.actions import verify_merge_action

    verify_merge_action(merge, **values)


def main() -> NoReturn:
    """Entry point of `drift-merge`."""
    entry.run(group, "drift-merge")
