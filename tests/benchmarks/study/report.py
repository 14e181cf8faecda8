"""Tables and figures from the stored runs: python -m tests.benchmarks.study.report DIR.

Differences are from SFT with the same seed and the same items; the interval is a percentile
bootstrap over seeds and items, both resampled (PLAN.md).
"""

import argparse
import csv
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from tests.benchmarks.study.rows import ROWS, SWEEPS
from tests.benchmarks.study.runs import best_rate, best_values, read, share

MEASURES = ("picture_sums", "reading", "easy_vqa", "text_sums")
DRAWS = 10_000
COLUMNS = ("row", "value", "seeds", *MEASURES, "difference", "low", "high", "verdict", "seconds")


def interval(one: list[str], other: list[str]) -> tuple[float, float, float]:
    """The mean difference of paired runs, and its 95 percent interval.

    Args:
        one: what was right, item by item; a string for each seed.
        other: the same seeds and items; a single string stands for every seed.
    """
    left, right = (np.array([[bit == "1" for bit in run] for run in runs]) for runs in (one, other))
    differences = left.astype(float) - right.astype(float)  # seeds x items; one seed is broadcast
    rng = np.random.default_rng(0)
    seeds, items = differences.shape
    # Of a product of resamplings the mean is the mean of rows, weighted, times columns, weighted.
    rows = rng.multinomial(seeds, [1 / seeds] * seeds, DRAWS) / seeds
    columns = rng.multinomial(items, [1 / items] * items, DRAWS) / items
    drawn = ((rows @ differences) * columns).sum(1)
    low, high = np.percentile(drawn, [2.5, 97.5])
    return float(differences.mean()), float(low), float(high)


def table(out: Path) -> list[dict[str, Any]]:
    """One row for each row of the study that has runs on the test split, in the study's order."""
    results = read(out)
    rate = best_rate(results)
    chosen = best_values((*ROWS, *SWEEPS), results, rate)
    runs: dict[str, dict[int, dict[str, Any]]] = defaultdict(dict)
    for run in results:
        if run["split"] == "test" and run["rate"] == rate:
            runs[run["row"]][run["seed"]] = run
    found = []
    for row in (*ROWS, *SWEEPS):
        good = {seed: run for seed, run in runs[row.name].items() if "error" not in run}
        if not good:
            errors = {run["error"] for run in runs[row.name].values()}
            found.append({"row": row.name, "verdict": "; ".join(sorted(errors)) or "not run"})
            continue
        line: dict[str, Any] = {"row": row.name, "seeds": len(good)}
        value = row.value(chosen)
        line["value"] = "" if value is None else f"{value:g}"
        line |= {m: f"{np.mean([share(run[m]) for run in good.values()]):.3f}" for m in MEASURES}
        line["seconds"] = f"{np.mean([run['seconds'] for run in good.values()]):.0f}"
        found.append(line | _difference(good, runs["SFT"]))
    return found


def _difference(good: dict[int, dict[str, Any]], sft: dict[int, dict[str, Any]]) -> dict[str, Any]:
    shared = sorted(good.keys() & sft.keys())
    one, other = ([runs[s]["picture_sums"] for s in shared] for runs in (good, sft))
    if len(good) == 1:  # what is not trained has no seeds: the same run against every seed of SFT
        other = [run["picture_sums"] for run in sft.values()]
        one = [next(iter(good.values()))["picture_sums"]] * len(other)
    if not one or good == sft:
        return {}
    mean, low, high = interval(one, other)
    verdict = "within noise" if low <= 0 <= high else "above SFT" if mean > 0 else "below SFT"
    numbers = {"difference": mean, "low": low, "high": high}
    return {key: f"{value:+.3f}" for key, value in numbers.items()} | {"verdict": verdict}


def markdown(lines: list[dict[str, Any]]) -> str:
    head = "| " + " | ".join(COLUMNS) + " |\n|---" + "|--:" * (len(COLUMNS) - 1) + "|\n"
    rows = ["| " + " | ".join(str(line.get(c, "")) for c in COLUMNS) + " |" for line in lines]
    return head + "\n".join(rows) + "\n"


def picture(lines: list[dict[str, Any]], to: Path) -> None:
    """Differences from SFT with their intervals, one line for each row."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = [line for line in lines if line.get("difference")][::-1]
    figure, axes = plt.subplots(figsize=(8, 0.28 * len(shown) + 1.2), layout="constrained")
    for y, line in enumerate(shown):
        mean, low, high = (100 * float(line[key]) for key in ("difference", "low", "high"))
        colour = "#777777" if line["verdict"] == "within noise" else "#0072B2"
        axes.plot([low, high], [y, y], color=colour, linewidth=2)
        axes.plot(mean, y, "o", color=colour, markersize=5)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(shown)), [line["row"] for line in shown], fontsize=8)
    axes.set_xlabel("right sums in pictures, difference from SFT in points (95 % interval)")
    figure.savefig(to, dpi=150)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    out = parser.parse_args().out
    lines = table(out)
    (out / "table.md").write_text(markdown(lines))
    with open(out / "table.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(lines)
    picture(lines, out / "differences.png")
    print(markdown(lines))


if __name__ == "__main__":
    main()
