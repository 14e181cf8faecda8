"""Measures and biases the gradients of a weight's LoRA factors; delta is projected every step.

All factors of the weight (A, B, DoRA's magnitude) share the coefficient of the prior's tensor,
taken from the norms and products of their gradients and directions together.
"""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from drift_merge.errors import RecipeError
from drift_merge.maths.lowrank import Rectangle, squared
from drift_merge.names.tensors import matrix_shape
from drift_merge.training.deltas.files import DeltaSource
from drift_merge.training.gradients.layout import GradientLayout
from drift_merge.training.inject.kernels.runs import Run
from drift_merge.training.inject.pieces import (
    DELTA_SQ,
    DOT,
    GRAD_SQ,
    PLACE,
    Cell,
)
from drift_merge.training.inject.scratch import CPU_GRADIENT_CHUNK, Scratch, computed
from drift_merge.training.inject.uses import DeltaUse
from drift_merge.training.lora.directions import directions
from drift_merge.training.lora.layers import Adapted, factor_units
from drift_merge.training.units import Block, Region, Unit


class AdaptedPiece:
    """The factors of one weight, and the units of it that one tensor of the prior covers."""

    is_fixed = False

    def __init__(
        self,
        units: Sequence[Unit],
        slot: int,
        adapted: Adapted,
        layout: GradientLayout,
        use: DeltaUse | None = None,
    ) -> None:
        self.slot, self._use = slot, use or DeltaUse()
        if self._use.needs_weights:
            raise RecipeError(
                f"rule='anchor' needs the weights themselves, but {units[0].name} is trained"
                " through an adapter.",
                remedy="Use another rule with adapters; until=1.0 stops at the reasoner there.",
            )
        # q, k and v of a fused weight move the same factors: all are measured before the first
        # of them is biased.
        self.tie = units[0].parameter_name
        self.units, self.layer = tuple(units), units[0].layer
        self.source: DeltaSource | None = None  # set when it is known where gradients lie
        self._adapted, self._layout = adapted, layout
        self._factors = factor_units(units[0], adapted)
        self._directions: list[Tensor | None] = []  # local ones, from measure() to bias()
        self.numel = sum(factor.numel for factor in self._factors)

    @property
    def group(self) -> ProcessGroup | None:
        """The ranks whose sums belong together."""
        return self._layout.group(self._factors[0])

    @property
    def parameters(self) -> Sequence[nn.Parameter]:
        """Whose gradients they are."""
        return [factor.parameter for factor in self._adapted.factors]

    @property
    def parameter_names(self) -> Sequence[str]:
        """Their names."""
        return [factor.parameter_name for factor in self._factors]

    def device(self) -> torch.device | None:
        """Where the gradients lie; None if there are none."""
        found = (self._layout.gradient(factor) for factor in self._factors)
        return next((gradient.device for gradient in found if gradient is not None), None)

    def measure(self, scratch: Scratch) -> list[Cell] | None:
        """This rank's sums over all factors; None if none has a gradient."""
        # Before a look at the gradients: where factors are sharded all ranks project together.
        self._directions = [_flat(d) for d in self._local_directions()]
        cells = self._places(self._directions, PLACE) if self._use.is_placed else []
        is_missing = True
        for i, (factor, direction) in enumerate(zip(self._factors, self._directions, strict=True)):
            found = self._layout.gradient(factor) if direction is not None else None
            if direction is None or found is None:
                is_missing = is_missing and direction is not None
                continue
            is_missing = False
            gradient = computed(found.reshape(-1), scratch.at(found.device))
            direction = direction.to(gradient.dtype)
            # In factor space, as the coefficient is: the entry of a factor, not of the weight.
            self._use.keep_unopposed(gradient, direction)
            self._directions[i] = direction
            cells.append((self.slot, GRAD_SQ, torch.dot(gradient, gradient)))
            cells.append((self.slot, DOT, torch.dot(gradient, direction)))
            cells.append((self.slot, DELTA_SQ, torch.dot(direction, direction)))
        return None if is_missing else cells

    def bias(self, coefficient: Tensor, scratch: Scratch) -> None:
        """Subtract coefficient * direction from the gradient of every factor."""
        for factor, direction in zip(self._factors, self._directions, strict=True):
            found = self._layout.gradient(factor) if direction is not None else None
            if direction is None or found is None:
                continue
            change = direction * coefficient.to(direction)
            found.copy_(found.to(change.dtype).sub_(change.view(found.shape)))
            self._layout.put(factor, found)
        self._directions = []

    def run(self, device: torch.device) -> Run | None:
        """None: factors are small, and their directions are made anew at every step."""
        return None

    def put(self, run: Run) -> None:
        """Nothing: there are no runs."""

    def position(self, scratch: Scratch) -> list[Cell]:
        """This rank's s * <B, delta A^T>, the product of delta with what the adapters add.

        And its share of delta*delta: every rank of a group reads all of delta.
        """
        ranks = 1 if self.group is None else torch.distributed.get_world_size(self.group)
        cells: list[Cell] = [(self.slot, DELTA_SQ, self._delta_sq() / ranks)]
        return cells + self._places([_flat(d) for d in self._local_directions()], DOT)

    def _places(self, directions: Sequence[Tensor | None], column: int) -> list[Cell]:
        """This rank's s * <B, delta A^T>."""
        cells: list[Cell] = []
        roles = [factor.role for factor in self._adapted.factors]
        for role, factor, local in zip(roles, self._factors, directions, strict=True):
            values = self._layout.values(factor) if role == "b" and local is not None else None
            if values is not None and local is not None:
                flat = values.reshape(-1).to(local.dtype)
                cells.append((self.slot, column, torch.dot(flat, local)))
        return cells

    def _delta_sq(self) -> Tensor:
        """delta*delta of the whole units, in runs of rows."""
        assert self.source is not None
        total = torch.zeros((), dtype=torch.float64)
        for unit in self.units:
            rows, cols = matrix_shape(unit.shape)
            parts = self._delta_factors(unit, cols, 0, rows, torch.empty(0))
            if parts is not None:
                total += squared(parts)
                continue
            step = max(1, CPU_GRADIENT_CHUNK // cols)
            for first in range(0, rows, step):
                run = self.source.rows(unit, first, min(first + step, rows)).reshape(-1).float()
                total = total.to(run.device) + torch.dot(run, run)
        return total

    def _delta_factors(
        self, unit: Unit, cols: int, first: int, end: int, like: Tensor
    ) -> Sequence[Rectangle] | None:
        """Rows [first, end) of a unit's delta by factors; None where it must be read."""
        assert self.source is not None
        return self.source.factors(unit, Block(first, end - first, 0, cols), like)

    def _local_directions(self) -> list[Tensor | None]:
        """The direction of every factor in its region on this rank."""
        assert self.source is not None
        total: list[Tensor] = []
        for unit in self.units:
            rows, cols = matrix_shape(unit.shape)
            read = partial(self.source.rows, unit)
            factors = partial(self._delta_factors, unit, cols)
            found = directions(self._adapted, read, unit.begin // cols, rows, factors)
            total = [a + b for a, b in zip(total, found, strict=True)] if total else list(found)
        regions = map(self._layout.region, self._factors)
        return [_cut(whole, region) for whole, region in zip(total, regions, strict=True)]


def _cut(whole: Tensor, region: Region | None) -> Tensor | None:
    if region is None:
        return None
    if region.slices is not None:
        return whole[region.slices]
    assert region.flat is not None
    return whole.reshape(-1)[slice(*region.flat)]


def _flat(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.reshape(-1)
