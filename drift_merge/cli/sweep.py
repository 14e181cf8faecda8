"""`drift-merge sweep` and `drift-prior apply`: what they do."""

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from drift_merge.cli import render
from drift_merge.cli.actions import describe_merge
from drift_merge.cli.entry import print_json
from drift_merge.cli.options import Run
from drift_merge.cli.planning import plan_run
from drift_merge.cli.pull import locate
from drift_merge.cli.streaming import (
    print_transfers,
    running,
    say_traffic,
    traffic_json,
    transfers_json,
    transfers_of,
)
from drift_merge.engine.job import check_plan
from drift_merge.engine.plan import Plan
from drift_merge.engine.prepare import Prepared, prepare
from drift_merge.engine.recipe_file import read_request
from drift_merge.engine.sweep import Setting, output_name, parse_settings, vary
from drift_merge.engine.transfers import Transfers
from drift_merge.errors import OutputError

Jobs = list[tuple[Prepared, Plan, Path]]


def sweep_action(
    file: Path,
    texts: tuple[str, ...],
    overrides: Mapping[str, Any],
    out: Path,
    run: Run,
    *,
    budget: bool,
) -> None:
    """Make one merge per setting in one pass; print a table of them."""
    from drift_merge.merges.make import make_merges

    settings = parse_settings(texts)
    recipe = read_request(file).recipe(overrides)
    quiet = run.quiet or run.as_json
    prepared = prepare(recipe, headers_only=run.dry_run or budget, stream=run.stream, quiet=quiet)
    jobs: Jobs = []
    for setting in settings:
        varied = replace(prepared, recipe=vary(recipe, dict(setting)))
        jobs.append((varied, varied.plan(), out / output_name(setting)))
    for _, plan, path in jobs:
        check_plan(plan, path, overwrite=run.overwrite)
    transfers = transfers_of(run, [plan for _, plan, _ in jobs])
    if not quiet:
        render.findings(prepared.findings)
    if budget or run.dry_run:
        _print_budget(jobs, out, run, transfers)
        return
    _require_space(jobs, out)
    total = sum(plan.write_bytes for _, plan, _ in jobs)
    with running(run, total, transfers) as options:
        made = make_merges(jobs, options)
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
        cells.append([row["output"], *values, counts, kept, render.size(row["size_bytes"])])
    render.table(["output", *names, "tensors", "change kept", "size"], cells)


def _print_budget(jobs: Jobs, out: Path, run: Run, transfers: Transfers | None) -> None:
    needed, free = _needed(jobs), _free(out)
    if run.as_json:
        moved = transfers_json(transfers, needed) if run.stream else {}
        budget = {"outputs": len(jobs), "needed_bytes": needed, "free_bytes": free}
        print_json({"schema": 1} | budget | moved)
        return
    reads = jobs[0][1].read_bytes
    print(f"Outputs   {len(jobs)} in {out}")
    print(f"Reads     about {render.size(reads)}, once for all")
    if run.stream:
        print_transfers(transfers, needed)
    print(f"Needs     {render.size(needed)} of disk; {render.size(free)} are free")


def _require_space(jobs: Jobs, out: Path) -> None:
    needed, free = _needed(jobs), _free(out)
    if needed > free:
        raise OutputError(
            f"the disk of {out} is too small for {len(jobs)} outputs: {needed:,} bytes are needed, "
            f"{free:,} are free.",
            remedy="Give fewer values, or another directory with -o.",
        )


def _needed(jobs: Jobs) -> int:
    return sum(plan.layout.size_bytes for _, plan, path in jobs if not path.exists())


def _free(out: Path) -> int:
    place = out.absolute()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


def apply_action(text: str, mllm: str, scale: float, values: dict[str, Any], run: Run) -> None:
    """Write mllm + scale * delta and say what was done; the prior may be on the Hub."""
    from drift_merge.merges.apply import apply_prior, apply_recipe
    from drift_merge.priors.manifest import open_prior

    out: Path = values.pop("output")
    silent = run.quiet or run.as_json or run.dry_run
    place, path = locate(text, "PRIOR", whole=not run.dry_run, quiet=silent)
    prior = open_prior(path)
    recipe = apply_recipe(place, prior.manifest, mllm, scale=scale, **values)
    prepared, plan, transfers = plan_run(recipe, out, run)
    if run.dry_run:
        return
    with running(run, plan.write_bytes, transfers) as options:
        made = apply_prior(prior.manifest, prepared, plan, out, options)
    describe_merge(made, plan, out, run)
