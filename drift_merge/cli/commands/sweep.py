"""`drift-merge sweep`: many merges of one recipe in a single pass over its inputs."""

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from drift_merge.cli import options, render, running
from drift_merge.cli.entry import print_json
from drift_merge.cli.planning import say_absent, say_skipped
from drift_merge.cli.running import CommandOptions
from drift_merge.cli.traffic import (
    engine_options,
    print_transfers,
    say_traffic,
    traffic_json,
    transfers_json,
    transfers_of,
)
from drift_merge.engine.job import check_plan
from drift_merge.errors import OutputError
from drift_merge.merges.make import make_merges
from drift_merge.plans.plan import Plan
from drift_merge.plans.prepare import Prepared, prepare
from drift_merge.plans.transfers import Transfers
from drift_merge.recipes.files import read_recipe
from drift_merge.recipes.own_methods import load_methods
from drift_merge.recipes.sweep import Setting, output_name, parse_settings, vary
from drift_merge.recipes.values import Methods
from drift_merge.storage import sizes

Jobs = list[tuple[Prepared, Plan, Path]]


def sweep_action(
    file: Path,
    texts: tuple[str, ...],
    own: Methods,
    out: Path,
    run: CommandOptions,
    *,
    budget: bool,
) -> None:
    """Make one merge per setting in one pass; print a table of them."""

    settings = parse_settings(texts)
    recipe = read_recipe(file, own).recipe()
    quiet = run.quiet or run.as_json
    say_absent(recipe, quiet=quiet)
    prepared = prepare(recipe, headers_only=run.dry_run or budget, stream=run.stream, quiet=quiet)
    jobs: Jobs = []
    for setting in settings:
        varied = replace(prepared, recipe=vary(recipe, dict(setting)))
        jobs.append((varied, varied.plan(), out / output_name(setting)))
    for _, plan, path in jobs:
        check_plan(plan, path, overwrite=run.overwrite)
    transfers = transfers_of(run, [plan for _, plan, _ in jobs])
    if not run.as_json:
        render.findings(prepared.findings, quiet=run.quiet)
        say_skipped(prepared)
    if budget or run.dry_run:
        _print_budget(jobs, out, run, transfers)
        return
    _require_space(jobs, out)
    total = sum(plan.write_bytes for _, plan, _ in jobs)
    with engine_options(run, total, transfers) as how:
        made = make_merges(jobs, how)
    rows = []
    for setting, (_, _, path), merge in zip(settings, jobs, made, strict=True):
        rows.append(_row(setting, path, merge.merge.manifest))
    if run.as_json:
        print_json({"schema": 1, "outputs": rows} | traffic_json(made[-1].outcome))
    elif run.quiet:
        print(*(row["output"] for row in rows), sep="\n")
    else:
        say_traffic(made[-1].outcome)
        _print_rows(rows)


def _row(setting: Setting, path: Path, manifest: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "output": str(path),
        "settings": {name: float(value) for name, value in setting},
        "counts": manifest["counts"],
        "change_kept": manifest["change_kept"],
        "size_bytes": manifest["size_bytes"],
    }


def _print_rows(rows: list[dict[str, Any]]) -> None:
    names = list(rows[0]["settings"])
    cells = []
    for row in rows:
        counts = ", ".join(f"{n:,} {method}" for method, n in row["counts"].items())
        kept = "-" if row["change_kept"] is None else f"{row['change_kept']:.0%}"
        values = [f"{row['settings'][name]:g}" for name in names]
        cells.append([row["output"], *values, counts, kept, sizes.size(row["size_bytes"])])
    render.table(["output", *names, "tensors", "change kept", "size"], cells)


def _print_budget(jobs: Jobs, out: Path, run: CommandOptions, transfers: Transfers | None) -> None:
    needed, free = _needed(jobs), _free(out)
    if run.as_json:
        moved = transfers_json(transfers, needed) if run.stream else {}
        budget = {"outputs": len(jobs), "needed_bytes": needed, "free_bytes": free}
        print_json({"schema": 1} | budget | moved)
        return
    reads = jobs[0][1].read_bytes
    print(f"Outputs   {len(jobs)} in {out}")
    print(f"Reads     about {sizes.size(reads)}, once for all")
    if run.stream:
        print_transfers(transfers, needed)
    print(f"Needs     {sizes.size(needed)} of disk; {sizes.size(free)} are free")


def _require_space(jobs: Jobs, out: Path) -> None:
    needed, free = _needed(jobs), _free(out)
    if needed > free:
        raise OutputError(
            f"the disk of {out} is too small for {len(jobs)} outputs: {needed:,} bytes are needed, "
            f"{free:,} are free.",
            remedy="Give fewer values, or another directory with -o.",
        )


def _needed(jobs: Jobs) -> int:
    new = [plan for _, plan, path in jobs if not path.exists()]
    return sum(plan.layout.size_bytes + plan.beside_bytes for plan in new)


def _free(out: Path) -> int:
    place = out.absolute()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


@click.command()
@click.argument("recipe", type=options.PATH)
@click.option(
    "--set",
    "settings",
    multiple=True,
    required=True,
    metavar="NAME=VALUES",
    help="weight=0.05:0.5:0.05 (from, to, step) or density=0.1,0.2; several are combined.",
)
@click.option("-o", "--output", type=options.PATH, required=True, help="Directory of the outputs.")
@click.option("--budget", is_flag=True, help="Show the disk needed, and stop.")
@options.methods_file
@options.streaming
@options.running
def sweep(
    recipe: Path,
    settings: tuple[str, ...],
    output: Path,
    budget: bool,
    methods_file: Path | None,
    **values: Any,
) -> None:
    """Make many merges of one recipe in a single pass over its inputs.

    Guide: drift-merge guide sweeps

    \b
    Example:
        drift-merge sweep recipe.yaml --set weight=0.05:0.5:0.05 -o sweep/
    """

    run = running.take_command_options(values)
    own = load_methods(methods_file)
    sweep_action(recipe, settings, own, output, run, budget=budget)
