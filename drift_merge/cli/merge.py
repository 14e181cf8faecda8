"""`drift-merge`: merges written as complete MLLM checkpoints."""

from functools import partial
from typing import NoReturn

import click

from drift_merge.cli import entry
from drift_merge.cli.entry import Lazy, UnderRanks, lazy
from drift_merge.maths.methods import METHODS, Method

TOGETHER = UnderRanks.TOGETHER

_HELP = """Merge reasoners into the language tower of a multimodal LLM.

REASONER is a text LLM that reasons, or another fine-tuning of the same MLLM; MLLM is the
multimodal model. Each is a directory, a .safetensors file beside its config.json, or a Hub id
org/name[@revision].
"""


def _make(method: Method) -> click.Command:
    from drift_merge.cli.commands.methods import method_command

    return method_command(method)


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


group = entry.group(
    "drift-merge",
    _HELP,
    {
        "Methods": {
            method.name: Lazy(_sentence(method.summary), partial(_make, method), TOGETHER)
            for method in METHODS.values()
        },
        "Verbs": {
            "run": lazy(
                "run", "run_command", "Make what a recipe, or an output's manifest, says.", TOGETHER
            ),
            "sweep": lazy(
                "sweep", "sweep", "Make many merges in one pass over the inputs.", TOGETHER
            ),
            "check": lazy(
                "evaluating.check", "check_command", "Load a merge and let it speak; in seconds."
            ),
            "evaluate": lazy(
                "evaluating.evaluate",
                "evaluate_command",
                "Evaluate a merge and the unmerged MLLM.",
            ),
            "search": lazy(
                "evaluating.search", "search_command", "Search the options that evaluate best."
            ),
            "methods": lazy("methods", "methods", "List the methods: formulas, needs, papers."),
            "guide": lazy("guide", "guide_merge", "Show a page of the manual, or list its topics."),
            "inspect": lazy("inspect", "of_merge", "Show how a merge was made."),
            "compare": lazy("looking.compare", "compare", "Say where two checkpoints differ."),
            "report": lazy("looking.report", "of_merge", "Write a page on a merge or a sweep."),
            "verify": lazy(
                "verify", "of_merge", "Read a merge again, and compute a sample anew.", TOGETHER
            ),
            "push": lazy("push", "push_merge", "Send a merge to the Hugging Face Hub, privately."),
            "pull": lazy("pull", "pull_merge", "Fetch a merge from the Hub, verified."),
        },
    },
)


def main() -> NoReturn:
    """Entry point of `drift-merge`."""
    entry.run(group, "drift-merge")
