"""Where the deltas of a handle wait: chosen at its first step, said in a line, given up at its end.

Before the first step, and for reports, they are read from the files.
"""

import logging
from collections.abc import Sequence

import torch

from drift_merge.training.deltas.factored import WithFactors
from drift_merge.training.deltas.files import FileDeltas
from drift_merge.training.deltas.gathered import GatheredDeltas
from drift_merge.training.deltas.held import Resident
from drift_merge.training.deltas.packed import Regions
from drift_merge.training.deltas.placement import Placement, place
from drift_merge.training.deltas.streamed import StreamedDeltas
from drift_merge.training.gradients.layout import GradientLayout
from drift_merge.training.inject.pieces import Piece

# What is measured before any of it is biased: delta passes through the device's memory but once.
_CUTS = {"streamed": "slot", "gathered": "layer"}
_log = logging.getLogger(__name__)


class Placing:
    """The deltas of a handle, on the host and where gradients are."""

    def __init__(self, files: FileDeltas, wanted: str) -> None:
        """Keep the files, and the `device` that attach() was given."""
        self.host: FileDeltas | Resident = files
        self.found: Placement | None = None  # from the first step on
        self._wanted = wanted

    @property
    def moving(self) -> StreamedDeltas | GatheredDeltas | None:
        """The deltas, if they move in a step."""
        source = None if self.found is None else self.found.source
        if isinstance(source, WithFactors):
            source = source.held
        return source if isinstance(source, StreamedDeltas | GatheredDeltas) else None

    @property
    def cut(self) -> str | None:
        """How `Injector.to` is to cut batches."""
        return None if self.found is None else _CUTS.get(self.found.kind)

    def choose(
        self,
        regions: Regions,
        pieces: Sequence[Piece],
        device: torch.device,
        layout: GradientLayout,
        state_bytes: int,
    ) -> Placement:
        """Bring delta to where gradients are, and say so."""
        self.found = place(
            self.host,
            regions,
            device,
            wanted=self._wanted,
            state_bytes=state_bytes,
            passes=2 if any(p.is_fixed and p.group is not None for p in pieces) else 1,
            group=getattr(layout, "replicas", None),
        )
        level = logging.WARNING if self.found.kind == "streamed" else logging.INFO
        _log.log(level, "%s", self.found.text)
        return self.found

    def leave(self, host: FileDeltas | Resident | None = None) -> None:
        """Give back what delta takes on the device; from now on the host's is another."""
        moving, self.found = self.moving, None
        if moving is not None:
            moving.close()
        self.host = self.host if host is None else host
