"""What people read: tables and sentences on stdout, findings and hints on stderr."""

import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from drift_merge.cli.entry import printable
from drift_merge.names.modules import classify
from drift_merge.names.tensors import STATUSES, Alignment, Finding
from drift_merge.plans.plan import Plan
from drift_merge.priors.summary import (
    advice,
    equal_sentence,
    show_share,
    stored_sentence,
    summarize,
)
from drift_merge.storage.measured import TensorRecord
from drift_merge.storage.sizes import size

MARKS = {"error": "Error", "warning": "Warning", "info": "Note"}


def table(columns: Sequence[str], rows: Iterable[Sequence[str]], *, title: str = "") -> None:
    """Print a table; the first column is left-aligned, the others right.

    A terminal gets rich's, a pipe plain aligned columns that no width can cut.
    """
    listed = [list(map(printable, row)) for row in rows]
    if title:
        print(title)
    if sys.stdout.isatty():
        _rich_table(columns, listed)
        return
    widths = [max(map(len, cells)) for cells in zip(columns, *listed, strict=True)]
    for row in [list(columns), *listed]:
        cells = [
            c.ljust(w) if i == 0 else c.rjust(w)
            for i, (c, w) in enumerate(zip(row, widths, strict=True))
        ]
        print("  ".join(cells).rstrip())


def _rich_table(columns: Sequence[str], rows: list[list[str]]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    drawn = Table(box=box.SIMPLE_HEAD)
    for index, column in enumerate(columns):
        drawn.add_column(column, justify="left" if index == 0 else "right", overflow="fold")
    for row in rows:
        drawn.add_row(*row)
    Console().print(drawn)


def note(text: str = "") -> None:
    """One line for people, on stderr."""
    print(printable(text), file=sys.stderr)


def findings(found: Iterable[Finding], *, quiet: bool = False) -> None:
    """Findings on stderr, the grave ones first; without mere notes if quiet."""
    order = list(MARKS)
    shown = (finding for finding in found if not quiet or finding.severity != "info")
    for finding in sorted(shown, key=lambda f: order.index(f.severity)):
        note(f"{MARKS[finding.severity]} [{finding.code}]: {finding.message}")
        if finding.severity != "info":
            note(f"  {finding.remedy}")


def alignment_table(alignment: Alignment) -> None:
    """One row per module: how many tensors of every status."""

    counts: dict[str, dict[str, int]] = {}
    for record in alignment.records:
        outside = record.status == "outside_tower"
        module = "outside the tower" if outside else classify(record.name)
        row = counts.setdefault(module, dict.fromkeys(STATUSES, 0))
        row[record.status] += 1
    order = ["attn", "mlp", "mixer", "norm", "embed", "head", "other", "outside the tower"]
    rows = []
    for module in sorted(counts, key=order.index):
        cells = [
            f"{counts[module][status]:,}" if counts[module][status] else "-" for status in STATUSES
        ]
        rows.append([module, *cells])
    table(["module", *STATUSES], rows)


def alignment_records(alignment: Alignment) -> None:
    """One row per tensor: its canonical name, what became of it, and its stored names."""
    rows = [
        [record.name, record.status, *map(_stored_names, (record.reasoner, record.mllm))]
        for record in alignment.records
    ]
    table(["tensor", "status", "reasoner", "mllm"], rows)


def _stored_names(names: Sequence[str]) -> str:
    return " + ".join(names) or "-"


def plan_summary(plan: Plan) -> None:
    """What a plan will do."""
    counts = ", ".join(f"{n:,} {method}" for method, n in plan.counts().items())
    print(f"Tensors   {counts}")
    print(f"Reads     {size(plan.read_bytes)}")
    print(f"Writes    {size(plan.layout.size_bytes)} in {len(plan.layout.shards):,} shard(s)")
    if plan.beside_bytes:
        count = len(plan.sources[0].sidecars)
        print(f"Carries   {size(plan.beside_bytes)} in {count:,} file(s) of the mllm's folder")


def plan_steps(plan: Plan) -> None:
    """Every tensor of a plan."""
    rows = []
    for step in plan.steps:
        weights = " ".join(f"{weight:g}" for weight in step.weights)
        rows.append([step.name, step.method, weights, step.dtype, "x".join(map(str, step.shape))])
    print()
    table(["tensor", "method", "weight", "dtype", "shape"], rows)


def plan_json(plan: Plan, *, verbose: bool) -> dict[str, Any]:
    """A plan as plain data; with `verbose`, every tensor."""
    value: dict[str, Any] = {
        "schema": 1,
        "dry_run": True,
        "tensors": plan.counts(),
        "read_bytes": plan.read_bytes,
        "write_bytes": plan.layout.size_bytes,
        "carried_bytes": plan.beside_bytes,
        "shards": [{"file": s.file, "bytes": s.file_bytes} for s in plan.layout.shards],
    }
    if verbose:
        value["steps"] = [
            {
                "name": step.name,
                "method": step.method,
                "dtype": step.dtype,
                "shape": list(step.shape),
                "weights": list(step.weights),
                "mllm_weight": step.mllm_weight if step.weights else None,
                "second_name_of": step.second_name_of or None,
                "inputs": [sorted({part.name for part in view.parts}) for view in step.inputs],
            }
            for step in plan.steps
        ]
    return value


def prior_table(manifest: Mapping[str, Any]) -> str:
    """Print the table of a prior by module; return what it means, a sentence a line."""

    tensors: Mapping[str, TensorRecord] = manifest["tensors"]
    rows = summarize(tensors)
    table(
        ["module", "tensors", "elements", "|delta|", "|delta|/|mllm|", "cosine", "equal"],
        [
            [
                row.module,
                f"{row.num_tensors:,}",
                f"{row.num_elements:,}",
                f"{row.norm_delta:.4g}",
                f"{row.relative_norm:.4f}",
                f"{row.cosine:.4f}",
                show_share(row.equal),
            ]
            for row in rows
        ],
    )
    origin = "base" if "base" in manifest["sources"] else "mllm"
    sentences = (
        stored_sentence(tensors),
        equal_sentence(rows, origin),
        advice(rows[-1].cosine),
    )
    return "\n".join(filter(None, sentences))
