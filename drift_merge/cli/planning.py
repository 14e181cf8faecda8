"""Up to the plan: prepare, plan, check the output, and with `--dry-run` print it all."""

from pathlib import Path
from typing import Any

from drift_merge.artifacts.describe import describe_findings
from drift_merge.cli import render
from drift_merge.cli.entry import print_json
from drift_merge.cli.running import CommandOptions
from drift_merge.cli.traffic import print_transfers, transfers_json, transfers_of
from drift_merge.engine.job import check_plan
from drift_merge.names.tensors import Finding
from drift_merge.plans.plan import Plan
from drift_merge.plans.prepare import Prepared, prepare
from drift_merge.plans.transfers import Transfers
from drift_merge.recipes.recipe import Recipe
from drift_merge.storage.sources import mistaken_path


def plan_run(
    recipe: Recipe, out: Path, run: CommandOptions
) -> tuple[Prepared, Plan, Transfers | None]:
    """Prepare and plan; report findings; with --dry-run, print the plan."""
    say_absent(recipe, quiet=run.quiet or run.as_json)
    quiet = run.quiet or run.as_json or run.dry_run
    prepared = prepare(recipe, headers_only=run.dry_run, stream=run.stream, quiet=quiet)
    plan = prepared.plan()
    check_plan(plan, out, overwrite=run.overwrite)
    transfers = transfers_of(run, [plan])
    if not run.as_json:
        render.findings(prepared.findings, quiet=run.quiet)
        say_skipped(prepared)
    size = plan.layout.size_bytes + plan.beside_bytes
    if run.dry_run and run.as_json:
        moved = transfers_json(transfers, size) if run.stream else {}
        value = render.plan_json(plan, verbose=run.verbose) | moved
        print_json(value | _findings(prepared.findings))
    elif run.dry_run:
        render.plan_summary(plan)
        if run.stream:
            print_transfers(transfers, size)
        if run.verbose:
            render.plan_steps(plan)
        render.note("Nothing was written (--dry-run).")
    return prepared, plan, transfers


def say_absent(recipe: Recipe, *, quiet: bool) -> None:
    """Say of a source that may be a mistyped path that the Hub is about to be asked for it."""
    sources = (*recipe.reasoners, recipe.mllm, *([recipe.base] if recipe.base else []))
    for text in () if quiet else sources:
        if path := mistaken_path(text):
            render.note(f"Note [absent]: There is no directory {path}: asking the Hub for {text}.")


def say_skipped(prepared: Prepared) -> None:
    """Count the selected tensors that have no partner; also when quiet, for the result differs."""
    others = [*prepared.reasoners, *([prepared.base] if prepared.base else [])]
    effect = "get no delta" if prepared.recipe.method == "prior" else "stay as the mllm has them"
    for checkpoint, alignment in others:
        skipped = alignment.num_selected - alignment.num_matched
        if skipped:
            render.note(
                f"Warning [skipped]: {skipped:,} of {alignment.num_selected:,} selected tensors "
                f"have no partner in {checkpoint.source.label} and {effect}."
            )


def _findings(found: tuple[Finding, ...]) -> dict[str, Any]:
    return {"findings": describe_findings(found)}
