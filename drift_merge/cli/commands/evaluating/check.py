"""`drift-merge check`: load a merge, let it speak, and say whether it is sound, in seconds."""

import os
import sys
from pathlib import Path
from typing import Any

import click

from drift_merge.cli import options, render
from drift_merge.cli.entry import print_json
from drift_merge.errors import VerificationError
from drift_merge.evaluation.check import Checked, CheckOptions, check
from drift_merge.evaluation.health import BROKEN, CANNOT_SEE
from drift_merge.evaluation.unmerged import unmerged_of

_ROWS = (
    ("perplexity of a bundled text", "perplexity"),
    ("answers", "num_answers"),
    ("with a picture", "num_pictures"),
    ("empty", "empty"),
    ("longer than the limit", "capped"),
    ("going round in circles", "repeating"),
    ("without a </think>", "unclosed"),
    ("parameters missing", "missing_keys"),
    ("parameters unexpected", "unexpected_keys"),
)


def check_action(
    model: str, mllm: str | None, how: CheckOptions, *, as_json: bool, quiet: bool
) -> None:
    """Check, print, and fail if the checkpoint is broken."""
    folder = Path(model)
    where = os.path.abspath(folder) if folder.exists() else model
    unmerged = mllm or unmerged_of(folder)
    if unmerged is not None and Path(unmerged).exists():
        unmerged = os.path.abspath(unmerged)
    found = check(where, unmerged, how)
    if as_json:
        print_json(found.as_data())
    elif quiet:
        print(found.sentence())
    else:
        _print(found)
    if found.verdict == BROKEN and not as_json:
        raise VerificationError(
            f"{model} is {found.sentence()}",
            remedy=f"Merge with a smaller weight, or see what differs: drift-merge inspect {model}",
        )
    if found.verdict == BROKEN:
        click.get_current_context().exit(VerificationError.exit_code)


def _print(found: Checked) -> None:
    rows = []
    for title, name in _ROWS:
        sides = [found.own, *([found.unmerged] if found.unmerged is not None else [])]
        rows.append([title, *(_cell(getattr(side, name)) for side in sides)])
    render.table(["", "this", *(["unmerged mllm"] if found.unmerged is not None else [])], rows)
    print()
    for answer in found.answers:
        text = " ".join(answer["text"].split())
        print(f"{answer['id']}: {text[:160]}{'...' if len(text) > 160 else ''}")
    print(f"\n{found.sentence()[0].upper()}{found.sentence()[1:]}")
    for note in (*found.notes, CANNOT_SEE):
        render.note(f"Note [unseen]: {note[0].upper()}{note[1:]}{'' if note[-1] == '.' else '.'}")


def _cell(value: Any) -> str:
    if isinstance(value, tuple):
        return str(len(value))
    return "-" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


@click.command(name="check")
@click.argument("model", metavar="OUT")
@click.option("--mllm", help="Unmerged, to compare with.  [default: from the manifest of OUT]")
@options.interpreter
@options.device_option
@click.option(
    "--load-dtype",
    "dtype",
    type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
    default="auto",
    show_default=True,
    help="In memory; auto is float32 on a CPU.",
)
@click.option(
    "--max-tokens",
    type=click.IntRange(min=8),
    default=128,
    show_default=True,
    metavar="N",
    help="Of an answer.",
)
@options.json_option
@options.quiet_option
def check_command(
    model: str,
    mllm: str | None,
    python: str | None,
    as_json: bool,
    quiet: bool,
    **values: Any,
) -> None:
    """Load a merge with transformers, let it speak, and say whether it is sound; in seconds.

    Needs: pip install 'drift_merge[train]'. It answers bundled prompts, beside the unmerged MLLM:
    what is missing, perplexity, repetition, empty or endless answers, a missing </think>.

    Guide: drift-merge guide evaluation

    \b
    Example:
        drift-merge check merged/ --mllm MLLM
    """
    how = CheckOptions(python=python or sys.executable, **values)
    check_action(model, mllm, how, as_json=as_json, quiet=quiet)
