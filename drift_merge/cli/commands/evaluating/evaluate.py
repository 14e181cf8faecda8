"""`drift-merge evaluate`: a merge and its unmerged MLLM, by a kit or a command, alike."""

import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import click

from drift_merge.cli import options, render
from drift_merge.cli.entry import print_json
from drift_merge.errors import RecipeError, nearest
from drift_merge.evaluation.command import command_of
from drift_merge.evaluation.ends import (
    KITS,
    CommandEvaluator,
    Evaluator,
    KitEvaluator,
    default_cache,
    evaluate_both,
    shareable,
)
from drift_merge.evaluation.kits import lmms_eval
from drift_merge.evaluation.kits.kit import MAX_PIXELS, MIN_PIXELS, KitOptions
from drift_merge.evaluation.unmerged import unmerged_of
from drift_merge.merges.evaluations import record_evaluation
from drift_merge.merges.manifest import open_merge
from drift_merge.storage.checkpoint import open_checkpoint


def evaluate_action(
    merge: Path,
    mllm: str | None,
    evaluator: Evaluator,
    *,
    cache: Path,
    record: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Evaluate both ends, print them, and write the result to the merge."""
    opened = open_merge(merge) if record or mllm is None else None
    unmerged = mllm or unmerged_of(merge)
    if unmerged is None:
        label = "" if opened is None else opened.manifest["sources"]["mllm"]["label"]
        raise RecipeError(
            f"the unmerged MLLM of {merge}, {label}, is not to be found from here.",
            remedy="Name it: --mllm MLLM",
        )
    is_silent = quiet or as_json
    found = evaluate_both(
        open_checkpoint(str(merge)),
        open_checkpoint(unmerged, quiet=is_silent),
        evaluator,
        out=merge.absolute().with_name(f"{merge.absolute().name}.evaluations"),
        cache=cache,
        say=(lambda _: None) if is_silent else render.note,
    )
    date = datetime.now(timezone.utc).date().isoformat()
    notes = []
    if record and opened is not None:
        kept = {**found, "settings": shareable(found["settings"])}
        notes = record_evaluation(opened, kept, date=date)
    if as_json:
        print_json({"schema": 1, "date": date, **found})
    else:
        _print(found)
    for note in () if is_silent else notes:
        render.note(f"Note [evaluation]: {note}")


def _print(found: dict[str, Any]) -> None:
    rows = []
    for row in found["results"]:
        paired = row["paired"]
        difference, verdict = f"{row['difference']:+.4g}", "unknown: no items"
        if paired is not None:
            difference += f" [{paired['low']:+.3g}, {paired['high']:+.3g}]"
            difference += "" if paired["p"] is None else f" p={paired['p']:.3g}"
            verdict = "within noise" if paired["is_noise"] else "different"
        items = "-" if paired is None else f"{paired['num_items']:,}"
        cells = [f"{row['value']:.4g}", f"{row['unmerged']:.4g}", difference, verdict]
        rows.append([f"{row['task']} ({row['metric']})", items, *cells])
    columns = ["task", "items", "this", "unmerged", "difference (95 %, paired)", "verdict"]
    render.table(columns, rows)


@click.command(name="evaluate")
@click.argument("merge", metavar="OUT", type=options.PATH)
@click.option(
    "--with",
    "kit",
    required=True,
    metavar="KIT",
    help="lmms-eval, vlmevalkit, or a command with {model} in it.",
)
@click.option(
    "--tasks",
    metavar="LIST",
    help="Of the kit, separated by commas.  [default: maths without a judge]",
)
@click.option("--mllm", help="Unmerged, evaluated too.  [default: from the manifest of OUT]")
@options.interpreter
@click.option(
    "--kit-path",
    type=options.PATH,
    metavar="DIR",
    help="Clone of VLMEvalKit, or tasks of your own for lmms-eval.",
)
@click.option("--kit-model", metavar="NAME", help="The kit's name for the model's class.")
@click.option("--kit-args", metavar="WORDS", help="More words for the kit.")
@click.option(
    "--model-args", metavar="K=V,...", help="More settings of the kit's model, for both ends."
)
@click.option(
    "--limit", type=click.IntRange(min=1), metavar="N", help="Items of each task; default all."
)
@click.option("--max-tokens", type=click.IntRange(min=1), metavar="N", help="Of an answer.")
@click.option(
    "--min-pixels",
    type=click.IntRange(min=1),
    default=MIN_PIXELS,
    show_default=True,
    metavar="N",
    help="Of a picture.",
)
@click.option(
    "--max-pixels",
    type=click.IntRange(min=1),
    default=MAX_PIXELS,
    show_default=True,
    metavar="N",
    help="Of a picture.",
)
@click.option("--kit-device", metavar="NAME", help="Where the kit computes.  [default: it chooses]")
@options.scoring
@click.option(
    "--cache", type=options.PATH, metavar="DIR", help="Of unmerged models.  [default: ~/.cache]"
)
@click.option(
    "--record/--no-record",
    default=True,
    show_default=True,
    help="Write the result into OUT: manifest, card, .eval_results.",
)
@options.json_option
@options.quiet_option
def evaluate_command(
    merge: Path,
    kit: str,
    mllm: str | None,
    metric: tuple[str, ...],
    items: tuple[str, ...],
    timeout: float | None,
    cache: Path | None,
    record: bool,
    as_json: bool,
    quiet: bool,
    **values: Any,
) -> None:
    """Evaluate a merge and its unmerged MLLM alike, and say whether the difference is noise.

    The kit runs in an interpreter of its own. The unmerged MLLM is evaluated once for the same
    settings. Needs nothing beside the kit.

    Guide: drift-merge guide evaluation

    \b
    Example:
        drift-merge evaluate merged/ --with lmms-eval --python eval-env/bin/python
    """
    if "{" in kit:
        command = command_of(kit, metric, items, timeout_seconds=timeout, option="--with")
        evaluator: Evaluator = CommandEvaluator(command, values["limit"])
    else:
        evaluator = KitEvaluator(_kit(kit, metric, items), _kit_options(kit, values), timeout)
    evaluate_action(
        merge,
        mllm,
        evaluator,
        cache=cache or default_cache(),
        record=record,
        as_json=as_json,
        quiet=quiet,
    )


def _kit(kit: str, metric: tuple[str, ...], items: tuple[str, ...]) -> str:
    if kit not in KITS:
        raise RecipeError(
            f"--with {kit}: there is no such kit, and no {{model}} in it.{nearest(kit, KITS)}",
            remedy=f"Kits: {', '.join(KITS)}; or a command: --with 'python evaluate.py {{model}}'",
        )
    if metric or items:
        raise RecipeError(
            f"--metric and --items are of commands; {kit} has its own.", remedy="Leave them out."
        )
    return kit


def _kit_options(kit: str, values: dict[str, Any]) -> KitOptions:
    given = values["tasks"] or (",".join(lmms_eval.DEFAULT_TASKS) if kit == "lmms-eval" else "")
    tasks = tuple(task.strip() for task in given.split(",") if task.strip())
    if not tasks:
        raise RecipeError(
            f"--tasks is missing: {kit} has no default.", remedy="Write --tasks MathVista_MINI"
        )
    pairs = [pair.partition("=") for pair in (values["model_args"] or "").split(",") if pair]
    return KitOptions(
        tasks=tasks,
        python=values["python"] or sys.executable,
        limit=values["limit"],
        max_tokens=values["max_tokens"],
        min_pixels=values["min_pixels"],
        max_pixels=values["max_pixels"],
        kit_model=values["kit_model"],
        kit_path=values["kit_path"],
        kit_args=tuple((values["kit_args"] or "").split()),
        model_args={name: value for name, _, value in pairs},
        device=values["kit_device"],
    )
