"""theta_0, the weights that a run began with: the rule `anchor` pulls by what is left of the way.

    theta_reasoner - theta_t = delta + theta_0 - theta_t

Held beside the weights, by each rank for its regions: in 16 bits where every value is one (weights
that were loaded so), else in float32. A resumed run reads them from the mllm that the prior names.
"""

from collections.abc import Mapping
from contextlib import ExitStack

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from drift_merge.errors import DriftMergeError, RecipeError
from drift_merge.training.deltas.opened import OpenPrior
from drift_merge.training.deltas.packed import Regions, numel_of
from drift_merge.training.deltas.refresh import CHUNK, SideValues, reading
from drift_merge.training.gradients.layout import GradientLayout
from drift_merge.training.units import Region, Unit, blocks_of, region_shape

_NARROW = (torch.bfloat16, torch.float16)


class Beginning:
    """theta_0 of this rank's regions; also a layout, as far as weights are looked at."""

    def __init__(self, held: Mapping[Unit, Tensor], layout: GradientLayout) -> None:
        self._held, self._layout = dict(held), layout  # flat, in the order of the region

    def take_away(self, unit: Unit, begin: int, theta: Tensor, delta: Tensor) -> None:
        """Make delta what is left of it: add theta_0 - theta, in place.

        Args:
            unit: whose.
            begin: first element, counted in the flattened region.
            theta: the weights there as they are now; flat.
            delta: flat, as many elements, float32 or float64.
        """
        first = self._held[unit][begin : begin + delta.numel()]
        delta.add_(first.to(delta)).sub_(theta.to(delta))

    def values(self, unit: Unit) -> Tensor | None:
        """theta_0 in the shape of its region; None where this rank has nothing of the unit."""
        held, region = self._held.get(unit), self.region(unit)
        return None if held is None or region is None else held.view(region_shape(unit, region))

    def region(self, unit: Unit) -> Region | None:
        """The part of a unit on this rank."""
        return self._layout.region(unit)

    def group(self, unit: Unit) -> ProcessGroup | None:
        """The ranks that share the unit."""
        return self._layout.group(unit)


def beginning_now(regions: Regions, layout: GradientLayout) -> Beginning:
    """Copy the weights as they are now.

    Args:
        regions: of this rank; all their weights are parameters, none is adapted.
        layout: gives their values.
    """
    held = {}
    for unit in regions:
        values = layout.values(unit)
        assert values is not None
        held[unit] = _narrowed(values.detach().reshape(-1))
    return Beginning(held, layout)


def saved_beginning(opened: OpenPrior, regions: Regions, layout: GradientLayout) -> Beginning:
    """Read the weights that a resumed run began with from the mllm that the prior names.

    They are rounded as the live parameter's dtype rounds.

    Raises:
        RecipeError: it is not there any more.
        AlignmentError, CheckpointError: it is another now.
    """
    named = opened.source("mllm")
    with ExitStack() as stack:
        try:
            pool, found = stack.enter_context(reading(opened, "mllm", named, regions))
        except DriftMergeError as error:
            raise RecipeError(
                "a resumed run with rule='anchor' reads the weights that it began with from the"
                f" prior's mllm, {named}: {error}",
                remedy="Put it where it was. Or attach before the weights of the checkpoint are"
                " loaded, and then handle.load_state_dict(state).",
            ) from error
        return pool.submit(_read, found, regions, layout).result()


def _read(found: SideValues, regions: Regions, layout: GradientLayout) -> Beginning:
    held = {}
    with torch.no_grad():
        for unit, region in regions.items():
            assert unit.parameter is not None
            values, at = torch.empty(numel_of(unit, region)), 0
            for block, wanted, _ in found.blocks(unit, blocks_of(unit, region, CHUNK)):
                values[at : at + block.numel] = wanted
                at += block.numel
            live = layout.values(unit)
            device = values.device if live is None else live.device
            held[unit] = _narrowed(values.to(unit.parameter.dtype)).to(device)
    return Beginning(held, layout)


def _narrowed(values: Tensor) -> Tensor:
    """A copy, in 16 bits if that loses nothing."""
    for dtype in _NARROW:
        narrow = values.to(dtype, copy=True)
        if torch.equal(narrow.to(values.dtype), values):
            return narrow
    return values.clone()
