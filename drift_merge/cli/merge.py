"""`drift-merge`: merges written as complete MLLM checkpoints."""

from typing import NoReturn

import click

from drift_merge.cli import entry
from drift_merge.cli.commands.inspect import inspect_merge
from drift_merge.cli.commands.methods import method_command, methods
from drift_merge.cli.commands.pull import pull_merge
from drift_merge.cli.commands.push import push_merge
from drift_merge.cli.commands.run import run_command
from drift_merge.cli.commands.sweep import sweep
from drift_merge.cli.commands.verify import verify_merge
from drift_merge.maths.methods import METHODS

HELP = {"help_option_names": ["-h", "--help"]}


@click.group(cls=entry.CommandGroup, context_settings=HELP)
@click.version_option(package_name="drift_merge", prog_name="drift-merge")
def group() -> None:
    """Merge text LLMs into the language tower of a multimodal LLM.

    REASONER is a text LLM, MLLM a multimodal one of the same family. Each is a directory, a
    .safetensors file beside its config.json, or a Hub id org/name[@revision].
    """


for _method in METHODS.values():
    group.add_command(method_command(_method))
group.add_command(run_command)


for _command in (methods, sweep, inspect_merge, verify_merge):
    group.add_command(_command)
group.add_command(push_merge)
group.add_command(pull_merge)


def main() -> NoReturn:
    """Entry point of `drift-merge`."""
    entry.run(group, "drift-merge")
