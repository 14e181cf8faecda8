"""Tables and figures from the stored runs alone: python -m tests.benchmarks.study.report DIR.

DIR holds runs.csv, or the results.jsonl of a study that ran there, from which it is made. With
--world smollm2 the rows are those around SmolLM2-135M.
"""

import argparse
import csv
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from tests.benchmarks.study.figures import curves, differences, strengths
from tests.benchmarks.study.rows import DRIFT, Row
from tests.benchmarks.study.runs import RESULTS, best_rate, best_values, read
from tests.benchmarks.study.stored import MEASURES, Stored, interval, load, store
from tests.benchmarks.study.worlds import WORLDS

COLUMNS = ("row", "value", "seeds", *MEASURES, "difference", "low", "high", "verdict", "seconds")
COMPARED = ("row", "against", "difference", "low", "high", "verdict")
PRIMARY = (
    (DRIFT, "SFT"),
    (DRIFT, f"{DRIFT}, random delta"),
    (DRIFT, f"{DRIFT}, permuted delta"),
    (DRIFT, f"{DRIFT}, random delta, own alpha"),
    (f"{DRIFT}, random delta, own alpha", "SFT"),
    ("DRIFT gradnorm", "DRIFT gradnorm, random delta"),
    ("LoRA 16, DRIFT adaptive_cosine", "LoRA 16"),
    (DRIFT, "linear, then SFT"),
)
Runs = dict[str, dict[int, Stored]]  # row -> seed -> run


def tests_of(stored: list[Stored], rate: float) -> Runs:
    """The runs on the test split, failed ones left out."""
    found: Runs = defaultdict(dict)
    for run in stored:
        if run.split == "test" and run.rate == rate and not run.error:
            found[run.row][run.seed] = run
    return found


def table(stored: list[Stored], rate: float, rows: Iterable[Row]) -> list[dict[str, Any]]:
    """One line for each row of the study, in its order; those without a run say so."""
    rows = list(rows)
    chosen = best_values(rows, stored, rate)
    runs = tests_of(stored, rate)
    found = []
    for row in rows:
        good = runs.get(row.name, {})
        if not good:
            errors = {run.error for run in stored if run.row == row.name and run.error}
            found.append({"row": row.name, "verdict": "; ".join(sorted(errors)) or "not run"})
            continue
        line: dict[str, Any] = {"row": row.name, "seeds": len(good)}
        value = row.value(chosen)
        line["value"] = "" if value is None else f"{value:g}"
        line |= {m: f"{np.mean([run.share(m) for run in good.values()]):.3f}" for m in MEASURES}
        line["seconds"] = f"{np.mean([float(run.seconds or 0) for run in good.values()]):.0f}"
        found.append(line | compared(good, runs["SFT"]))
    return found


def compared(one: dict[int, Stored], other: dict[int, Stored]) -> dict[str, Any]:
    """The paired difference of two rows in right sums; {} for a row and itself.

    What is not trained has one run, which stands beside every seed of the other.
    """
    if one is other:
        return {}
    shared = sorted(one.keys() & other.keys())
    if len(one) == 1:
        shared = sorted(other)
        one = dict.fromkeys(shared, next(iter(one.values())))
    mean, low, high = interval([one[s].right for s in shared], [other[s].right for s in shared])
    verdict = "within noise" if low <= 0 <= high else "above" if mean > 0 else "below"
    numbers = {"difference": mean, "low": low, "high": high}
    return {key: f"{value:+.3f}" for key, value in numbers.items()} | {"verdict": verdict}


def comparisons(runs: Runs) -> list[dict[str, Any]]:
    """The comparisons that the plan names, and those that belong to them."""
    return [
        {"row": one, "against": other} | compared(runs[one], runs[other])
        for one, other in PRIMARY
        if runs.get(one) and runs.get(other)
    ]


def markdown(lines: list[dict[str, Any]], columns: Iterable[str]) -> str:
    """Lines as a table."""
    names = list(columns)
    head = "| " + " | ".join(names) + " |\n|---" + "|--:" * (len(names) - 1) + "|\n"
    rows = ["| " + " | ".join(str(line.get(c, "")) for c in names) + " |" for line in lines]
    return head + "\n".join(rows) + "\n"


def text_of(stored: list[Stored], rows: Iterable[Row]) -> str:
    """Both tables."""
    rate = best_rate(stored)
    lines = markdown(table(stored, rate, rows), COLUMNS)
    return lines + "\n" + markdown(comparisons(tests_of(stored, rate)), COMPARED)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--world", choices=WORLDS, default="tiny")
    options = parser.parse_args()
    out, rows = options.directory, WORLDS[options.world].rows
    if (out / RESULTS).exists():
        store(read(out), out)
    stored = load(out)
    rate = best_rate(stored)
    lines = table(stored, rate, rows)
    runs = tests_of(stored, rate)
    text = text_of(stored, rows)
    (out / "table.md").write_text(text)
    with open(out / "table.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)
    differences(lines, rows, out / "differences.png")
    curves(runs, out / "curves.png")
    strengths(stored, rate, rows, out / "strengths.png")
    print(text)


if __name__ == "__main__":
    main()
