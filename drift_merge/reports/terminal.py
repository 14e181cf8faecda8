"""A heat map for the terminal: a row for each kind of tensor, a column for each layer.

Coloured where the terminal has colours; shades of grey blocks with NO_COLOR, and ASCII letters
where blocks cannot be written. 80 columns at most: further layers share a column.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from drift_merge.names.modules import classify
from drift_merge.reports.figures import FigureKind, Group, Scale, TensorFigures, cells, scale_of
from drift_merge.reports.places import LANGUAGE, Place, kinds_of

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

WIDTH = 80
_MAX_ROWS, _MAX_LABEL = 14, 18
_BLOCKS, _LETTERS = "\u00b7\u2591\u2592\u2593\u2588", ".:-=+*#%@"
_UNKNOWN, _NONE = "?", " "
# cividis (Nunez, Anderton and Renslow 2018), made for readers who cannot tell red from green
CIVIDIS = (
    *("#00224e", "#123570", "#3b496c", "#575d6d", "#707173"),
    *("#8a8678", "#a59c74", "#c3b369", "#e1cc55", "#fee838"),
)

Row = tuple[str, list[Group | None]]  # label, and what is in each column


@dataclass(frozen=True, slots=True)
class TextMap:
    """What is drawn: values by row and column."""

    rows: tuple[tuple[str, tuple[float | None, ...], tuple[bool, ...]], ...]
    # label; values, None where not known; whether there is a tensor at all
    layers: tuple[int, ...]
    by: int  # layers of one column
    scale: Scale


def lay_out(tensors: Sequence[TensorFigures], kind: FigureKind) -> TextMap | None:
    """The map of the language tower; None where it has no layer, or nothing is known."""
    tower = [t for t in tensors if t.part == LANGUAGE]
    grouped = {place: g for place, g in cells(tower).items() if place.layer is not None}
    layers = tuple(dict.fromkeys(p.layer for p in grouped if p.layer is not None))
    if not layers:
        return None
    labels = kinds_of(grouped)
    labelled = {place: _short(place.kind) for place in grouped}
    if len(labels) > _MAX_ROWS or len(set(labelled.values())) < len(labels):
        labelled = {place: _module(place) for place in grouped}
    room = WIDTH - min(_MAX_LABEL, max(map(len, labelled.values()))) - 1
    by = -(-len(layers) // room)
    columns = [layers[first : first + by] for first in range(0, len(layers), by)]
    order = dict.fromkeys(
        labelled[p] for kind_name in labels for p in grouped if p.kind == kind_name
    )
    rows = []
    for label in order:
        found = [_joined(grouped, labelled, label, column) for column in columns]
        values = tuple(None if g is None else getattr(g, kind.key) for g in found)
        rows.append((label[:_MAX_LABEL], values, tuple(g is not None for g in found)))
    scale = scale_of(grouped.values(), kind.key)
    return TextMap(tuple(rows), layers, by, scale) if scale else None


def _joined(
    grouped: dict[Place, Group], labels: dict[Place, str], label: str, layers: Sequence[int]
) -> Group | None:
    tensors = [
        tensor
        for place, group in grouped.items()
        if place.layer in layers and labels[place] == label
        for tensor in group.tensors
    ]
    return Group(tuple(tensors)) if tensors else None


def _short(kind: str) -> str:
    module, _, leaf = kind.rpartition(".")
    name = leaf if leaf != "bias" else f"{module.rpartition('.')[2]}.bias"
    return name.replace("_proj", "").replace("_layernorm", " norm")


def _module(place: Place) -> str:
    return classify(f"layers.0.{place.kind}.weight")


def draw(found: TextMap, kind: FigureKind, console: "Console") -> list["Text"]:
    """The lines of a map for a console, with colours if it has any."""
    from rich.text import Text

    has_color = console.color_system is not None and not console.no_color
    ramp = _BLOCKS if console.encoding.lower().startswith("utf") else _LETTERS
    label = max(len(row[0]) for row in found.rows)
    cell = max(1, min(2, (WIDTH - label - 1) // len(found.rows[0][1])))
    lines = [_legend(found, kind, ramp, has_color=has_color)]
    for name, values, there in found.rows:
        line = Text(f"{name:<{label}} ")
        for value, is_there in zip(values, there, strict=True):
            _add(line, found, value, cell, ramp, is_there=is_there, has_color=has_color)
        lines.append(line)
    lines.append(Text(" " * (label + 1) + _ticks(found, cell)))
    return lines


def _add(
    line: "Text",
    found: TextMap,
    value: float | None,
    cell: int,
    ramp: str,
    *,
    is_there: bool,
    has_color: bool,
) -> None:
    if value is None:
        line.append((_UNKNOWN if is_there else _NONE) * cell)
    elif has_color:
        line.append(_NONE * cell, style=f"on {CIVIDIS[_level(found, value, len(CIVIDIS))]}")
    else:
        line.append(ramp[_level(found, value, len(ramp))] * cell)


def _level(found: TextMap, value: float, count: int) -> int:
    low, high = found.scale.low, found.scale.high
    if low == high:
        return count // 2 if value == low else 0 if value < low else count - 1
    return max(0, min(int((value - low) / (high - low) * count), count - 1))


def _legend(found: TextMap, kind: FigureKind, ramp: str, *, has_color: bool) -> "Text":
    from rich.text import Text

    scale = found.scale
    low, high = (_number(v, kind) for v in (scale.low, scale.high))
    low = f"<= {low}" if scale.has_lower else low
    high = f">= {high}" if scale.has_higher else high
    text = Text(f"{kind.label} by layer: ")
    if scale.low == scale.high and not (scale.has_lower or scale.has_higher):
        return text.append(f"{low} everywhere")
    text.append(f"{low} ")
    for level in range(len(CIVIDIS if has_color else ramp)):
        style = f"on {CIVIDIS[level]}" if has_color else ""
        text.append(_NONE if has_color else ramp[level], style=style)
    text.append(f" {high}")
    is_known = all(
        value is not None or not is_there
        for _, values, there in found.rows
        for value, is_there in zip(values, there, strict=True)
    )
    return text if is_known else text.append("   ? not known")


def _number(value: float, kind: FigureKind) -> str:
    return f"{value:.2%}" if kind.is_share else f"{value:.4g}"


def _ticks(found: TextMap, cell: int) -> str:
    """The numbers of some layers below their columns."""
    line = ""
    for column in range(len(found.rows[0][1])):
        number = str(found.layers[column * found.by])
        at = column * cell
        is_due = column == 0 or int(number) % 5 == 0 or found.by > 1
        if is_due and at >= len(line) + (1 if line else 0):
            line = line.ljust(at) + number
    return line + (f"   ({found.by} layers a column)" if found.by > 1 else "")
