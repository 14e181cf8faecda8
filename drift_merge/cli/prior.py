"""`drift-prior`: align, compute, compress, inspect, verify, apply, demo."""

from pathlib import Path
from typing import Any, NoReturn

import click

from drift_merge.cli import config_file, entry, options
from drift_merge.cli.compress import compress_command
from drift_merge.cli.pull import locate, pull_prior
from drift_merge.cli.push import push_prior
from drift_merge.cli.train import train

HELP = {"help_option_names": ["-h", "--help"]}


@click.group(cls=entry.Group, context_settings=HELP)
@click.version_option(package_name="drift_merge", prog_name="drift-prior")
def group() -> None:
    """Compute, check and inspect reasoning priors: theta_reasoner - theta_mllm.

    REASONER is a text LLM, MLLM a multimodal one of the same family. Each is a directory, a
    .safetensors file beside its config.json, or a Hub id org/name[@revision].
    """


@click.command()
@click.argument("sources", nargs=-1, metavar="REASONER MLLM")
@options.config
@options.selection("attn,mlp")
@options.json_option
@click.pass_context
def align(ctx: click.Context, /, sources: tuple[str, ...], as_json: bool, **recipe: Any) -> None:
    """Pair the tensors of two models, from headers and configs alone.

    \b
    Example:
        drift-prior align deepseek-ai/DeepSeek-R1-Distill-Qwen-7B Qwen/Qwen2.5-VL-7B-Instruct
    """
    from drift_merge.cli.actions import align_action

    reasoners, mllm = config_file.sources(ctx, sources)
    ctx.exit(align_action(reasoners, mllm, recipe, as_json=as_json))


@click.command()
@click.argument("sources", nargs=-1, metavar="REASONER MLLM")
@options.config
@options.print_config
@click.option("--base", help="Common ancestor; then delta = reasoner - base.")
@options.selection("attn,mlp")
@options.writing("bfloat16", *options.COMPRESSED_DTYPES)
@click.option(
    "--through",
    type=click.Choice(options.DTYPES),
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
    from drift_merge.cli.actions import compute_action

    run = options.take_run(values)
    reasoners, mllm = config_file.sources(ctx, sources)
    if config_file.wants_print(ctx):
        config_file.print_call("prior", reasoners, mllm, values, run)
        return
    compute_action(reasoners, mllm, values, run)


@click.command("inspect")
@click.argument("prior")
@options.json_option
def inspect_prior(prior: str, as_json: bool) -> None:
    """Show what a prior is made of, from its manifest.

    PRIOR is a directory, or a Hub id org/name[@revision]; no tensor is fetched.

    \b
    Example:
        drift-prior inspect prior/
    """
    from drift_merge.cli.actions import inspect_prior_action

    inspect_prior_action(locate(prior, "PRIOR", whole=False)[1], as_json=as_json)


@click.command("verify")
@click.argument("prior")
@click.option("--reasoner", help="With --mllm: compute a random sample of tensors again.")
@click.option("--mllm", help="The model that the prior was computed against.")
@click.option("--base", help="For a prior that was computed with one.")
@click.option("--map", "map_file", type=options.PATH, help="The --map that was used, if one was.")
@options.sampling
@options.streaming
@options.threads_option
@options.json_option
@options.quiet_option
def verify_prior(prior: str, **values: Any) -> None:
    """Re-read a prior: files, headers, fingerprints, finiteness; exit 1 names the first bad tensor.

    PRIOR is a directory, or a Hub id org/name[@revision].

    \b
    Example:
        drift-prior verify prior/ --reasoner REASONER --mllm MLLM
    """
    from drift_merge.cli.actions import verify_prior_action

    quiet = values["quiet"] or values["as_json"]
    verify_prior_action(locate(prior, "PRIOR", quiet=quiet)[1], **values)


@click.command()
@click.argument("prior")
@click.argument("mllm")
@click.option(
    "--scale",
    type=float,
    default=0.1,
    show_default=True,
    metavar="X",
    help="Factor of delta; 1 gives the reasoner's weights.",
)
@options.writing("source")
@options.streaming
@options.running
def apply(prior: str, mllm: str, scale: float, **values: Any) -> None:
    """Write mllm + scale * delta as a complete MLLM checkpoint.

    PRIOR is a directory, or a Hub id org/name[@revision].

    \b
    Example:
        drift-prior apply prior/ MLLM --scale 0.1 -o merged/
    """
    from drift_merge.cli.sweep import apply_action

    run = options.take_run(values)
    apply_action(prior, mllm, scale, values, run)


@click.command()
@click.option("-o", "--output", type=options.PATH, help="Keep the results here; must not exist.")
@options.quiet_option
def demo(output: Path | None, quiet: bool) -> None:
    """Run the whole path on a small pair of checkpoints made on the spot; no network.

    \b
    Example:
        drift-prior demo
    """
    from drift_merge.cli.demo import demo_action

    demo_action(output, quiet=quiet)


for _command in (align, compute, inspect_prior, verify_prior, apply, demo):
    group.add_command(_command)
group.add_command(compress_command)
group.add_command(push_prior)
group.add_command(pull_prior)
group.add_command(train)


def main() -> NoReturn:
    """Entry point of `drift-prior`."""
    entry.run(group, "drift-prior")
