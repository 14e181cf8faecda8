"""The winner of a search in words, and beside the models that it is compared with."""

from collections.abc import Mapping, Sequence
from typing import Any

from drift_merge.reports.pages.document import rounded
from drift_merge.searches.pages.charts import intervals
from drift_merge.searches.results import verdict

ROLES = {"mllm": "unmerged mllm", "default": "default recipe", "best": "best"}
ITEMS = {"validation": "validation items", "final": "held-out items"}
_PRIMARY = {"better": "Better than the unmerged mllm", "worse": "Worse than the unmerged mllm"}
_PRIMARY |= {"within noise": "Within noise", "unknown: no items": "Not known whether it is noise"}


def describe_winner(found: Mapping[str, Any], metrics: Sequence[str]) -> dict[str, Any]:
    """The label, and two sentences: which trial it is, and whether it is more than noise."""
    if found["best"] is None:
        count = len(found["trials"])
        failed = f"All {count:,} trials failed." if count > 1 else "The only trial failed."
        return {
            "label": "No trial has ended with a score",
            "sentences": [failed, "Their errors are below; nothing was made."],
        }
    best = next(t for t in found["trials"] if t["number"] == found["best"])
    values = ", ".join(f"{metric} {best['values'][metric]:.4g}" for metric in metrics)
    settings = ", ".join(f"{n} {_short(v)}" for n, v in best["parameters"].items())
    place = "is the best"
    if len(metrics) > 1:
        front = len(found["front"])
        place = f"is on the knee of a Pareto front of {front:,} trials"
        place = place if front > 1 else "is better in one metric or more, and nowhere worse"
    among = f"Of {len(found['trials']):,} trials" if len(found["trials"]) > 1 else "Of one trial"
    first = f"{among}, trial {found['best']} {place}: {values} ({settings})."
    split = "final" if any(row["on"] == "final" for row in found["comparisons"]) else "validation"
    rows = [r for r in found["comparisons"] if r["against"] == "mllm" and r["on"] == split]
    if not rows:
        return {"label": "The best trial", "sentences": [first, "It was compared with nothing."]}
    goals = {metric["name"]: metric["goal"] for metric in found["metrics"]}
    verdicts = {row["metric"]: verdict(row, goals) for row in rows}
    labels = set(verdicts.values())
    label = ", ".join(f"{metric} {text}" for metric, text in verdicts.items())
    told = "; ".join(f"{r['metric']} {_difference(r)}: {_said(verdicts, r)}" for r in rows)
    return {
        "label": _PRIMARY[labels.pop()]
        if len(labels) == 1
        else f"Against the unmerged mllm: {label}",
        "sentences": [first, f"Against the unmerged mllm on the {ITEMS[split]}: {told}."],
    }


def _difference(row: Mapping[str, Any]) -> str:
    """A comparison in short: the difference, with its interval and p where they are known."""
    paired = row["paired"]
    if paired is None:
        return f"{row['difference']:+.4g}"
    text = f"{paired['difference']:+.4g} [{paired['low']:+.3g}, {paired['high']:+.3g}]"
    return text + ("" if paired["p"] is None else f", p = {paired['p']:.3g}")


def _said(verdicts: Mapping[str, str], row: Mapping[str, Any]) -> str:
    found = verdicts[row["metric"]]
    return found if row["paired"] else "whether that is noise is not known"


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def beside(found: Mapping[str, Any], metrics: Sequence[str]) -> dict[str, Any]:
    """The section of the best beside the unmerged mllm and the default recipe."""
    goals = {metric["name"]: metric["goal"] for metric in found["metrics"]}
    scores = []
    for split, items in ITEMS.items():
        for role, title in ROLES.items():
            one = found[split].get(role, {})
            values = one.get("values")
            shown = title if role != "best" else f"best (trial {found['best']})"
            if values is not None:
                cells = [rounded(values[metric]) for metric in metrics]
                scores.append([shown, items, *cells, one.get("num_items", {}).get(metrics[0])])
            elif one.get("error"):
                message = str(one["error"]["message"]).partition("\n")[0]
                scores.append([f"{shown}: {message}", items, *(None for _ in metrics), None])
    rows = []
    for row in found["comparisons"]:
        paired = row["paired"] or {}
        interval = f"{paired['low']:+.3g} to {paired['high']:+.3g}" if paired else None
        p = paired.get("p")
        won = [None if p is None else f"{p:.3g}", paired.get("wins"), paired.get("losses")]
        name = f"best against the {ROLES[row['against']]}"
        about = [row["metric"], ITEMS[row["on"]], rounded(row["difference"])]
        rows.append([name, *about, interval, *won, verdict(row, goals)])
    text = "Differences are best minus other, over the items that both have answered; the bar is "
    text += "the 95 % interval. Within noise: p, of McNemar's exact test, is above 0.05, or "
    text += "without one the bar holds 0."
    columns = ["comparison", "metric", "on", "difference", "95 % interval", "p"]
    columns += ["only best right", "only other right", "verdict"]
    return {
        "key": "beside",
        "title": "The best beside the others" if found["best"] is not None else "The others",
        "text": text if rows else "Measured before the trials.",
        "missing": "" if scores else "Nothing was evaluated.",
        "charts": intervals(found, ROLES, ITEMS),
        "tables": [
            _table(["model", "items", *metrics, "number of items"], scores),
            *([_table(columns, rows)] if rows else []),
        ],
    }


def _table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> dict[str, Any]:
    """Without the columns that are known of no row."""
    kept = [i for i in range(len(columns)) if any(row[i] is not None for row in rows)]
    shown = [[row[i] for i in kept] for row in rows]
    return {"columns": [columns[i] for i in kept], "rows": shown}
