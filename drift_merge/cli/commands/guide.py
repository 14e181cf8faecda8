"""`drift-merge guide` and `drift-prior guide`: the manual, on a terminal or in a pipe."""

import sys

import click

from drift_merge import guides


def guide_action(topic: str | None, program: str) -> None:
    """Print a guide, or the list of all."""
    if topic is not None:
        _show(guides.text_of(topic))
        return
    width = max(map(len, guides.topics()))
    for name in guides.topics():
        print(f"{name.ljust(width)}  {_plain(guides.first_sentence(name))}")
    print(f"\nRead one: {program} guide TOPIC")


def _show(markdown: str) -> None:
    """Drawn on a terminal; as it is written elsewhere, for grep, less and other programs."""
    if not sys.stdout.isatty():
        print(markdown, end="")
        return
    from rich.console import Console
    from rich.markdown import Markdown

    Console().print(Markdown(markdown))


def _plain(sentence: str) -> str:
    return sentence.replace("`", "")


@click.command("guide")
@click.argument("topic", required=False)
def guide_prior(topic: str | None) -> None:
    """Read the manual: without TOPIC a list of what there is.

    \b
    Example:
        drift-prior guide training
    """
    guide_action(topic, "drift-prior")


@click.command("guide")
@click.argument("topic", required=False)
def guide_merge(topic: str | None) -> None:
    """Read the manual: without TOPIC a list of what there is.

    \b
    Example:
        drift-merge guide merging
    """
    guide_action(topic, "drift-merge")
