"""`prior.png`, `merge.png` and `train.png`: pictures for cards, in one style, by matplotlib.

The same numbers give the same bytes (with one version of matplotlib): no time, no host.
"""

import io
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any

from drift_merge.errors import RecipeError
from drift_merge.reports.figures import (
    KINDS,
    FigureKind,
    Group,
    Scale,
    TensorFigures,
    cells,
    scale_of,
)
from drift_merge.reports.places import LANGUAGE, Place, kinds_of

# Okabe and Ito's colours, each with a dash of its own, as on the pages.
_LINES = (
    *(("#0072b2", "-"), ("#d55e00", "--"), ("#009e73", ":"), ("#cc79a7", "-.")),
    *(("#e69f00", (0, (1, 3))), ("#56b4e9", (0, (8, 3)))),
)
_DPI = 130
_SHOWN = KINDS[:2]  # relative norm and cosine


def has_matplotlib() -> bool:
    """Whether pictures can be drawn here."""
    try:
        import_module("matplotlib.figure")
    except ImportError:
        return False
    return True


def _figure(width: float, height: float) -> Any:
    """An empty figure.

    Raises:
        RecipeError: matplotlib is not installed.
    """
    try:
        kind = import_module("matplotlib.figure").Figure
    except ImportError as error:
        raise RecipeError(
            "Pictures are drawn by matplotlib, which is not installed.",
            remedy="pip install 'drift_merge[report]'",
        ) from error
    return kind(figsize=(width, height), layout="constrained")


def _bytes(figure: Any) -> bytes:
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=_DPI, metadata={"Software": None})
    return image.getvalue()


def heat_maps(
    tensors: Sequence[TensorFigures], *, title: str, kinds: Sequence[FigureKind] = _SHOWN
) -> bytes:
    """Heat maps of the language tower side by side, as PNG.

    Args:
        tensors: of a prior, or measured.
        title: above.
        kinds: which statistics.

    Raises:
        RecipeError: matplotlib is not installed.
    """
    tower = [t for t in tensors if t.part == LANGUAGE]
    grouped = {place: group for place, group in cells(tower).items() if place.layer is not None}
    names = kinds_of(grouped)
    layers = list(dict.fromkeys(place.layer for place in grouped))
    height = min(9.0, 1.9 + 0.16 * max(len(layers), 8))
    figure = _figure(max(6.4, 2.2 + 0.5 * len(names) * len(kinds) / 2), height)
    axes = figure.subplots(1, len(kinds), squeeze=False)[0]
    for axis, kind in zip(axes, kinds, strict=True):
        values = [
            [_value(grouped.get(Place(LANGUAGE, layer, name)), kind) for name in names]
            for layer in layers
        ]
        _draw(figure, axis, kind, scale_of(grouped.values(), kind.key), values, names, layers)
    figure.suptitle(title, fontsize=10)
    return _bytes(figure)


def _value(group: Group | None, kind: FigureKind) -> float:
    found = None if group is None else getattr(group, kind.key)
    return float("nan") if found is None else float(found)


def _draw(
    figure: Any,
    axis: Any,
    kind: FigureKind,
    scale: Scale | None,
    values: list[list[float]],
    names: Sequence[str],
    layers: Sequence[int | None],
) -> None:
    axis.set_title(kind.label, fontsize=9)
    if scale is None:
        axis.text(0.5, 0.5, "not known of any layer", ha="center", transform=axis.transAxes)
        axis.set_axis_off()
        return
    low, high = scale.low, scale.high
    pad = 0.0 if high > low else abs(low) * 0.05 or 0.05
    # What is not known stays hatched: no colour of the scale.
    axis.set_facecolor("#ffffff")
    axis.patch.set(hatch="////", edgecolor="#b0b0b0")
    image = axis.imshow(
        values, cmap="cividis", aspect="auto", vmin=low - pad, vmax=high + pad, origin="upper"
    )
    axis.set_xticks(range(len(names)), [_short(name) for name in names], rotation=90, fontsize=7)
    step = 1 if len(layers) <= 12 else 2 if len(layers) <= 32 else 5
    ticks = range(0, len(layers), step)
    axis.set_yticks(list(ticks), [str(layers[tick]) for tick in ticks], fontsize=7)
    axis.set_ylabel("layer", fontsize=8)
    beyond = {(1, 1): "both", (1, 0): "min", (0, 1): "max", (0, 0): "neither"}
    ends = beyond[scale.has_lower, scale.has_higher]
    bar = figure.colorbar(image, ax=axis, fraction=0.08, pad=0.03, extend=ends)
    bar.ax.tick_params(labelsize=7)
    unit = {"relative_norm": "|delta| / |B|", "cosine": "cos(A, B)"}.get(kind.key, kind.label)
    bar.set_label(unit, fontsize=8)


def _short(name: str) -> str:
    return name.replace("self_attn.", "").replace("mlp.", "").replace("_proj", "")


def curves(panels: Sequence[Mapping[str, Any]], *, title: str, x_label: str) -> bytes:
    """Curves one above the other, a line for each module, as PNG.

    Args:
        panels: of `reports.runs.describe_panels`; those without a series are left out.
        title: above.
        x_label: below.

    Raises:
        RecipeError: matplotlib is not installed.
    """
    shown = [panel for panel in panels if panel["series"]]
    figure = _figure(7, 2.2 * max(1, len(shown)))
    axes = figure.subplots(max(1, len(shown)), 1, sharex=True, squeeze=False)[:, 0]
    for axis, panel in zip(axes, shown, strict=False):
        for number, series in enumerate(panel["series"]):
            color, dash = _LINES[number % len(_LINES)]
            xs = [x for x, _ in series["points"]]
            ys = [float("nan") if y is None else y for _, y in series["points"]]
            mark = "." if len(xs) < 30 else ""
            axis.plot(
                xs,
                ys,
                color=color,
                linestyle=dash,
                linewidth=1.3,
                marker=mark,
                label=series["name"],
            )
        axis.set_ylabel(panel["unit"], fontsize=8)
        axis.set_title(panel["label"], fontsize=9, loc="left")
        axis.grid(alpha=0.3)
        if len(panel["series"]) > 1:
            axis.legend(fontsize=7, ncols=3)
    axes[-1].set_xlabel(x_label)
    axes[-1].xaxis.get_major_locator().set_params(integer=True)
    figure.suptitle(title, fontsize=10)
    return _bytes(figure)
