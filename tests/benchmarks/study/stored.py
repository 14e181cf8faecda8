"""The runs as a table of commas, small enough to commit: what was right as hexadecimal bits."""

import csv
import json
from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

MEASURES = ("picture_sums", "reading", "easy_vqa", "text_sums")
NAME = "runs.csv"
DRAWS = 10_000


@dataclass(frozen=True, slots=True)
class Stored:
    """One run. Of a failed one the last field says why, and the numbers are empty."""

    row: str
    value: float | None
    seed: int
    rate: float
    split: str
    bits: str  # of picture_sums, one for each item, as "<items>:<hexadecimal>"
    reading: float | None
    easy_vqa: float | None
    text_sums: float | None
    seconds: float | None  # of the CPU, merging and training
    peak_mb: int | None
    curve: str  # "step:share" by blanks, on the validation split
    error: str

    @property
    def right(self) -> np.ndarray:
        """Which sums were right, (items,) of bool."""
        items, _, digits = self.bits.partition(":")
        return np.array([bit == "1" for bit in f"{int(digits, 16):0{int(items)}b}"])

    def share(self, measure: str) -> float:
        """Of right items of a measure, 0 to 1."""
        return float(self.right.mean() if measure == "picture_sums" else getattr(self, measure))

    def points(self) -> list[tuple[int, float]]:
        """The learning curve."""
        found = (point.split(":") for point in self.curve.split())
        return [(int(step), float(share)) for step, share in found]


def store(results: list[dict[str, Any]], to: Path) -> None:
    """Write what `runs` has collected, in a fixed order."""
    rows = as_stored(results)
    rows.sort(key=lambda r: (r.split, r.row, r.value or 0, r.rate, r.seed))
    with open(to / NAME, "w", newline="") as file:
        writer = csv.DictWriter(file, [f.name for f in fields(Stored)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)


def as_stored(results: list[dict[str, Any]]) -> list[Stored]:
    """What `runs` has collected."""
    return [_stored(result) for result in results]


def load(directory: Path) -> list[Stored]:
    """Read the runs of a directory."""
    with open(directory / NAME, newline="") as file:
        return [_parsed(line) for line in csv.DictReader(file)]


def _stored(result: dict[str, Any]) -> Stored:
    head = {key: result[key] for key in ("row", "value", "seed", "rate", "split")}
    if "error" in result:
        empty = dict.fromkeys(("reading", "easy_vqa", "text_sums", "seconds", "peak_mb"))
        return Stored(**head, bits="", **empty, curve="", error=json.dumps(result["error"]))
    bits = result["picture_sums"]
    shares = {
        m: round(result[m].count("1") / len(result[m]), 4) if m in result else None
        for m in MEASURES[1:]
    }
    return Stored(
        **head,
        bits=f"{len(bits)}:{int(bits, 2):x}",
        **shares,
        seconds=result["seconds"],
        peak_mb=result["peak_mb"],
        curve=" ".join(f"{step}:{share:g}" for step, share in result["curve"]),
        error="",
    )


def _parsed(line: dict[str, str]) -> Stored:
    numbers = {
        name: float(line[name]) if line[name] else None
        for name in ("value", "rate", "reading", "easy_vqa", "text_sums", "seconds")
    }
    peak = int(line["peak_mb"]) if line["peak_mb"] else None
    return Stored(**line | numbers | {"seed": int(line["seed"]), "peak_mb": peak})  # type: ignore[arg-type]


def interval(one: list[np.ndarray], other: list[np.ndarray]) -> tuple[float, float, float]:
    """The mean difference of paired runs and its 95 percent interval.

    A percentile bootstrap over seeds and items, both resampled (PLAN.md).

    Args:
        one: what was right, item by item; an array for each seed.
        other: the same seeds and items.
    """
    differences = np.array(one, float) - np.array(other, float)  # seeds x items
    rows, columns = _draws(*differences.shape)
    drawn = ((rows @ differences) * columns).sum(1)
    low, high = np.percentile(drawn, [2.5, 97.5])
    return float(differences.mean()), float(low), float(high)


@cache
def _draws(seeds: int, items: int) -> tuple[np.ndarray, np.ndarray]:
    """How often each draw has each seed and each item, as shares: (DRAWS, seeds), (DRAWS, items).

    Of a product of resamplings the mean is the mean of rows, weighted, times columns, weighted.
    """
    rng = np.random.default_rng(0)
    rows = rng.multinomial(seeds, [1 / seeds] * seeds, DRAWS) / seeds
    return rows, rng.multinomial(items, [1 / items] * items, DRAWS) / items
