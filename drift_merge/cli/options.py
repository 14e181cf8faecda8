"""Options that several commands share: same option, same name, same help everywhere."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from drift_merge.cli import config_file
from drift_merge.cli.running import check_device, default_threads
from drift_merge.storage.compressed import COMPRESSED

Command = TypeVar("Command", bound=Callable[..., Any])
Decorator = Callable[[Command], Command]

PATH: Any = click.Path(path_type=Path)
OUTPUT_DTYPES = ("bfloat16", "float16", "float32", "source")
COMPRESSED_DTYPES = tuple(COMPRESSED)


def chain(*decorators: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Several click decorators as one, first to last as they appear in the help."""

    def apply(command: Any) -> Any:
        for decorator in reversed(decorators):
            command = decorator(command)
        return command

    return apply


config = click.option(
    "--config",
    type=PATH,
    is_eager=True,
    expose_value=False,
    callback=config_file.load,
    help="YAML with any of these options; a flag overrides it.",
)

print_config = click.option(
    "--print-config",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=config_file.remember_print,
    help="Print this call as a recipe for drift-merge run, and stop.",
)


def selection(modules: str) -> Callable[[Any], Any]:
    """Which tensors: modules, layers, map, mismatch."""
    return chain(
        click.option(
            "--modules",
            default=modules,
            show_default=True,
            metavar="LIST",
            help="attn, mlp, norm, embed, head, full, or re:REGEX on canonical names.",
        ),
        click.option("--layers", metavar="RANGES", help="Such as 0:28 or 0,4:12; default all."),
        click.option(
            "--map", "map_file", type=PATH, help="YAML of name patterns for unusual layouts."
        ),
        click.option(
            "--on-mismatch",
            type=click.Choice(["error", "skip"]),
            default="error",
            show_default=True,
            help="skip: leave selected tensors without a partner as the mllm has them.",
        ),
    )


output_option = click.option(
    "-o",
    "--output",
    type=PATH,
    callback=config_file.require_output,
    help="Directory to create.  [required]",
)
shard_size_option = click.option(
    "--max-shard-size", default="5GB", show_default=True, metavar="SIZE", help="Of a shard."
)


def writing(dtype: str, *more: str) -> Callable[[Any], Any]:
    """How the output is written: the default dtype, and choices beside the usual ones."""
    return chain(
        output_option,
        click.option(
            "--dtype",
            type=click.Choice([*OUTPUT_DTYPES, *more]),
            default=dtype,
            show_default=True,
            help="Of the output; source keeps the mllm's.",
        ),
        shard_size_option,
        click.option("--allow-nonfinite", is_flag=True, help="Accept NaN and Inf in the inputs."),
    )


json_option = click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
quiet_option = click.option("-q", "--quiet", is_flag=True, help="Only the answer, no progress.")
threads_option = click.option(
    "--threads",
    type=click.IntRange(min=1),
    default=default_threads,
    show_default="cores",
    metavar="N",
    help="Workers.",
)

streaming = chain(
    click.option(
        "--stream",
        is_flag=True,
        help="Read Hub sources shard by shard: fetch, use, delete.",
    ),
    click.option(
        "--cache-limit",
        default="20GB",
        show_default=True,
        metavar="SIZE",
        help="With --stream: disk for fetched shards.",
    ),
)

running = chain(
    click.option(
        "--device",
        default="cpu",
        show_default=True,
        metavar="NAME",
        callback=check_device,
        help="Where to compute: cpu, cuda, cuda:N.",
    ),
    threads_option,
    click.option("--overwrite", is_flag=True, help="Replace OUT after success."),
    click.option("-n", "--dry-run", is_flag=True, help="Stop at the plan and print it."),
    click.option("-v", "--verbose", is_flag=True, help="With --dry-run: one line per tensor."),
    json_option,
    quiet_option,
)


sampling = chain(
    click.option(
        "--sample",
        type=click.IntRange(min=1),
        default=8,
        show_default=True,
        metavar="N",
        help="Tensors to compute again.",
    ),
    click.option(
        "--seed",
        type=int,
        default=None,
        metavar="N",
        help="Of the sample; default a new one, which is printed.",
    ),
)
