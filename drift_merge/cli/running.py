"""How a command runs and reports: device, threads, disk, output; no byte depends on it."""

import re
from dataclasses import dataclass
from typing import Any

import click

from drift_merge.errors import RecipeError
from drift_merge.recipes.words import DEFAULT_CACHE_SIZE
from drift_merge.storage.outputs.existing import Overwrite


@dataclass(frozen=True, slots=True, kw_only=True)
class CommandOptions:
    """How a command runs and reports; none of it changes a byte of the output."""

    device: str = "cpu"
    threads: int = 1
    stream: bool = False
    cache_limit: str = DEFAULT_CACHE_SIZE
    overwrite: Overwrite = False
    dry_run: bool = False
    verbose: bool = False
    as_json: bool = False
    quiet: bool = False


def check_device(_: click.Context, __: click.Parameter, device: str) -> str:
    """Click callback: the form of `--device`; whether it exists is asked when there is work."""
    if re.fullmatch(r"cpu|cuda(:\d+)?", device) is None:
        raise click.BadParameter(f"{device!r} is not one of cpu, cuda, cuda:N.")
    return device


def require_device(device: str) -> None:
    """Refuse a CUDA device that torch does not see; imports torch for one.

    Raises:
        RecipeError: saying how many there are.
    """
    if device == "cpu":
        return
    import torch

    count = torch.cuda.device_count()
    if int(device.partition(":")[2] or 0) >= count:
        raise RecipeError(
            f"--device is {device}; torch sees {count} CUDA device(s) here.",
            remedy="Use --device cpu, or see: nvidia-smi",
        )


def take_command_options(values: dict[str, Any]) -> CommandOptions:
    """Take the options of `running` and `streaming` out of a command's keyword arguments."""
    return CommandOptions(
        **{name: values.pop(name) for name in CommandOptions.__slots__ if name in values}
    )
