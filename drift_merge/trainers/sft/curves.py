"""The course of a training: a CSV of what was logged, and a picture of it.

Both depend on the logged numbers alone, so that the same run gives the same files.
"""

import csv
import io
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any

Log = Mapping[str, Any]  # one entry of the trainer's history

_FIRST = ("step", "epoch", "loss", "learning_rate", "grad_norm")
_PANELS = (
    ("loss", "loss"),
    ("drift/cosine", "cos(g, delta)"),
    ("drift/bias_ratio", "|bias| / |g|"),
)


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
    """Loss, cosine and bias ratio over the steps; None where matplotlib is not installed."""
    try:
        figure_of: Any = import_module("matplotlib.figure").Figure
    except ImportError:
        return None
    rows = steps_of(history)
    panels = [(key, label) for key, label in _PANELS if any(key in row for row in rows)]
    figure = figure_of(figsize=(7, 2.2 * max(1, len(panels))), layout="constrained")
    axes = figure.subplots(max(1, len(panels)), 1, sharex=True, squeeze=False)[:, 0]
    for axis, (key, label) in zip(axes, panels, strict=False):
        points = [(row["step"], row[key]) for row in rows if key in row]
        axis.plot(*zip(*points, strict=True), color="tab:blue", linewidth=1.2)
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
    axes[0].set_title(title, fontsize=10)
    axes[-1].set_xlabel("optimizer step")
    axes[-1].xaxis.get_major_locator().set_params(integer=True)
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=120, metadata={"Software": None})
    return image.getvalue()
