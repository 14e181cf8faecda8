"""README, guides and commands, as the tests of documents see them."""

from pathlib import Path

import click

from drift_merge import guides
from drift_merge.cli import merge, prior

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
GUIDES = {topic: guides.text_of(topic) for topic in guides.topics()}
DOCUMENTS = {"README": README, **GUIDES}
GROUPS = {"drift-prior": prior.group, "drift-merge": merge.group}
CONTEXTS = {
    program: click.Context(group, info_name=program, **group.context_settings)
    for program, group in GROUPS.items()
}
COMMANDS = {
    (program, name): group.get_command(CONTEXTS[program], name)
    for program, group in GROUPS.items()
    for name in group.list_commands(CONTEXTS[program])
}


def options_of(command: click.Command) -> dict[str, set[str]]:
    """Long flag -> all flags of an option."""
    return {
        max(parameter.opts, key=len): {*parameter.opts, *parameter.secondary_opts}
        for parameter in command.params
        if isinstance(parameter, click.Option)
    }
