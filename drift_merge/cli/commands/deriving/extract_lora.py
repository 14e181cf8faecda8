"""`drift-prior extract-lora`: a prior as a PEFT adapter for its MLLM."""

from math import prod
from pathlib import Path

import click

from drift_merge.cli import options, render
from drift_merge.cli.commands.pull import locate
from drift_merge.cli.entry import print_json
from drift_merge.cli.progress import progress
from drift_merge.priors.manifest import open_prior
from drift_merge.recipes.words import DTYPE_CODES
from drift_merge.storage.outputs.existing import Overwrite


@click.command("extract-lora")
@click.argument("prior")
@options.output_option
@click.option("--rank", type=click.IntRange(min=1), metavar="K", help="Directions of every layer.")
@click.option(
    "--energy",
    type=click.FloatRange(0, 1, min_open=True),
    metavar="SHARE",
    help="Of every layer as few directions as hold this share of |delta|^2, such as 0.9.",
)
@click.option(
    "--max-rank", type=click.IntRange(min=1), metavar="K", help="With --energy: no more than these."
)
@click.option(
    "--dtype",
    type=click.Choice(tuple(DTYPE_CODES)),
    default="bfloat16",
    show_default=True,
    help="Of the factors.",
)
@click.option("--mllm", metavar="MLLM", help="Where its config is, if no longer where it was.")
@options.threads_option
@options.overwrite_option
@options.json_option
@options.quiet_option
def extract_lora(
    prior: str,
    output: Path,
    rank: int | None,
    energy: float | None,
    max_rank: int | None,
    dtype: str,
    mllm: str | None,
    threads: int,
    overwrite: Overwrite,
    as_json: bool,
    quiet: bool,
) -> None:
    """Write a prior as a LoRA adapter (PEFT) for its MLLM as transformers loads it.

    PRIOR is a directory, or a Hub id org/name[@revision]. Norms, biases and embeddings cannot be
    held by an adapter: they are counted, and named in lora.json. Needs the extra `train`.

    Guide: drift-prior guide lora

    \b
    Example:
        drift-prior extract-lora prior/ --rank 32 -o adapter/
        drift-prior extract-lora prior/ --energy 0.9 --max-rank 512 -o adapter/
    """
    from drift_merge.trainers.extraction import adapter as files
    from drift_merge.trainers.extraction.extract import extract_lora as extract

    silent = quiet or as_json
    opened = open_prior(locate(prior, "PRIOR", quiet=silent)[1])
    size_bytes = 4 * sum(prod(entry["shape"]) for entry in opened.tensors.values())
    with progress("Decomposing", size_bytes, quiet=silent) as advance:
        made = extract(
            opened,
            output,
            rank=rank,
            energy=energy,
            max_rank=max_rank,
            dtype=dtype,
            mllm=mllm,
            threads=threads,
            overwrite=overwrite,
            progress=advance,
        )
    if made.rank > files.SERVED_RANK:
        render.note(
            f"Warning: rank {made.rank:,} is more than vLLM serves ({files.SERVED_RANK}): use"
            f" --rank {files.SERVED_RANK}, or --max-rank {files.SERVED_RANK} beside --energy."
        )
    if as_json:
        answer = {k: v for k, v in files.manifest(made).items() if k not in ("layers", "seal")}
        print_json({"schema": 1, "output": str(output), **answer})
        return
    if quiet:
        print(output)
        return
    print(files.sentence(made))
    for reason, count in made.reasons().items():
        print(f"not in the adapter: {count:,} x {reason}")
    print(f"Wrote {output}")
