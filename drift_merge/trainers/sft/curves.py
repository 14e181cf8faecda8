"""The course of a training: a CSV of what was logged, and a picture of it.

Both depend on the logged numbers alone, so that the same run gives the same files.
"""

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

from drift_merge.reports.pages.runs import describe_panels
from drift_merge.reports.pictures import curves, has_matplotlib

Log = Mapping[str, Any]  # one entry of the trainer's history

_FIRST = ("step", "epoch", "loss", "learning_rate", "grad_norm")


def steps_of(history: Sequence[Log]) -> list[Log]:
    """The entries that are of training steps, not of the end."""
    return [log for log in history if "loss" in log and "step" in log]


def to_csv(history: Sequence[Log]) -> bytes:
    """One row a logged step; columns in a fixed order, then drift's by name."""
    rows = steps_of(history)
    names = {name for row in rows for name in row}
    columns = [*(n for n in _FIRST if n in names), *sorted(names.difference(_FIRST))]
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def to_png(history: Sequence[Log], *, title: str) -> bytes | None:
    """Loss, cosine, bias ratio and distance over the steps; None where matplotlib is not there."""
    if not has_matplotlib():
        return None
    panels = [p for p in describe_panels(steps_of(history)) if p["key"] != "alpha"]
    return curves(panels, title=title, x_label="optimizer step")
