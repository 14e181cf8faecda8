"""The heat map that `inspect` and `compare` show on a terminal; nothing in a pipe."""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from drift_merge.reports.figures import FigureKind, TensorFigures


def print_heat_map(tensors: "Sequence[TensorFigures]", kind: "FigureKind") -> None:
    """Print the map of the language tower, if stdout is a terminal."""
    if not sys.stdout.isatty():
        return
    from rich.console import Console

    from drift_merge.reports.terminal import draw, lay_out

    found = lay_out(tensors, kind)
    if found is None:
        return
    console = Console(highlight=False)
    for line in draw(found, kind, console):
        console.print(line, no_wrap=True, overflow="crop", soft_wrap=True)
