"""The study's pictures: differences from SFT, learning curves, strength on the validation split."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from tests.benchmarks.study.rows import DRIFT, Row
from tests.benchmarks.study.stored import Stored

SHOWN = (  # in the curves: colours and dashes that do not need to be told apart by colour alone
    ("SFT", "#000000", "-"),
    (DRIFT, "#0072B2", "-"),
    (f"{DRIFT}, random delta", "#D55E00", "--"),
    (f"{DRIFT}, permuted delta", "#CC79A7", ":"),
    ("linear, then SFT", "#009E73", "-."),
)


def _axes(width: float, height: float) -> Any:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt.subplots(figsize=(width, height), layout="constrained")


def _save(figure: Any, to: Path) -> None:
    import matplotlib.pyplot as plt

    figure.savefig(to, dpi=110, metadata={"Software": None})
    plt.close(figure)


def differences(lines: list[dict[str, Any]], rows: Iterable[Row], to: Path) -> None:
    """Differences from SFT with their intervals, one line for each row that is trained, and M."""
    trained = {row.name for row in rows if row.is_trained} | {"M", "linear", "ties"}
    shown = [line for line in lines if line.get("difference") and line["row"] in trained][::-1]
    figure, axes = _axes(8, 0.24 * len(shown) + 1.2)
    for y, line in enumerate(shown):
        mean, low, high = (100 * float(line[key]) for key in ("difference", "low", "high"))
        colour = "#777777" if line["verdict"] == "within noise" else "#0072B2"
        axes.plot([low, high], [y, y], color=colour, linewidth=2)
        axes.plot(mean, y, "o", color=colour, markersize=5)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(shown)), [line["row"] for line in shown], fontsize=8)
    axes.set_xlabel("right sums in pictures: difference from SFT in points (95 % interval)")
    axes.set_ylim(-0.6, len(shown) - 0.4)
    axes.grid(axis="x", alpha=0.3)
    _save(figure, to)


def curves(runs: dict[str, dict[int, Stored]], to: Path) -> None:
    """Share of right sums over the steps, mean and range of the seeds, on the validation split."""
    figure, axes = _axes(7, 3.8)
    for row, colour, dashes in SHOWN:
        listed = [run.points() for run in runs.get(row, {}).values()]
        if not listed:
            continue
        steps = [step for step, _ in listed[0]]
        shares = 100 * np.array([[share for _, share in points] for points in listed])
        axes.plot(steps, shares.mean(0), dashes, color=colour, label=f"{row} ({len(listed)} seeds)")
        axes.fill_between(steps, shares.min(0), shares.max(0), color=colour, alpha=0.12)
    axes.set_xlabel("step")
    axes.set_ylabel("right sums in pictures, percent")
    axes.set_ylim(0, 100)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    _save(figure, to)


def strengths(stored: list[Stored], rate: float, rows: Iterable[Row], to: Path) -> None:
    """What was chosen from: each rule and prior at every alpha, on validation, one seed."""
    figure, axes = _axes(9, 4.2)
    markers = iter("os^vD*PXp<>h")
    for row in rows:
        if row.prior is None or not row.choices:
            continue
        found = {
            run.value: 100 * run.share("picture_sums")
            for run in stored
            if (run.row, run.split, run.rate, run.error) == (row.name, "validation", rate, "")
        }
        points = sorted((value, share) for value, share in found.items() if value is not None)
        if points:
            axes.plot(*zip(*points, strict=True), marker=next(markers), label=row.name)
    sft = [r.share("picture_sums") for r in stored if _is_sft(r, rate)]
    axes.axhline(100 * float(np.mean(sft)), color="black", linewidth=1, label="SFT")
    axes.set_xscale("log")
    axes.set_xlabel("alpha")
    axes.set_ylabel("right sums in pictures, percent (validation, one seed)")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.01, 0.5))
    _save(figure, to)


def _is_sft(run: Stored, rate: float) -> bool:
    return (run.row, run.split, run.rate, run.error) == ("SFT", "validation", rate, "")
