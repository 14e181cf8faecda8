"""`drift-prior`: align, compute, compress, inspect, verify, apply, demo."""

from typing import NoReturn

import click

from drift_merge.cli import entry
from drift_merge.cli.commands.align import align
from drift_merge.cli.commands.apply import apply
from drift_merge.cli.commands.compress import compress_command
from drift_merge.cli.commands.compute import compute
from drift_merge.cli.commands.demo import demo
from drift_merge.cli.commands.inspect import inspect_prior
from drift_merge.cli.commands.pull import pull_prior
from drift_merge.cli.commands.push import push_prior
from drift_merge.cli.commands.train import train
from drift_merge.cli.commands.verify import verify_prior

HELP = {"help_option_names": ["-h", "--help"]}


@click.group(cls=entry.CommandGroup, context_settings=HELP)
@click.version_option(package_name="drift_merge", prog_name="drift-prior")
def group() -> None:
    """Compute, check and inspect reasoning priors: theta_reasoner - theta_mllm.

    REASONER is a text LLM, MLLM a multimodal one of the same family. Each is a directory, a
    .safetensors file beside its config.json, or a Hub id org/name[@revision].
    """


for _command in (align, compute, inspect_prior, verify_prior, apply, demo):
    group.add_command(_command)
group.add_command(compress_command)
group.add_command(push_prior)
group.add_command(pull_prior)
group.add_command(train)


def main() -> NoReturn:
    """Entry point of `drift-prior`."""
    entry.run(group, "drift-prior")
