"""Biases gradients: local sums, one all-reduce per group, coefficients by the rule, g -= c * delta.

Nothing waits for the device: coefficients stay tensors. Without a group the second pass follows
the first tensor by tensor, while gradient and delta are in the cache.

Shapes: P = number of slots, one for each tensor of the prior.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from drift_merge.maths.injection import Rule, Sums
from drift_merge.training.inject.kernels.choose import LazyKernels
from drift_merge.training.inject.kernels.runs import Run
from drift_merge.training.inject.pieces import (
    COLUMNS,
    DELTA_SQ,
    DOT,
    GRAD_SQ,
    PLACE,
    Piece,
)
from drift_merge.training.inject.scatter import ScatterAdd
from drift_merge.training.inject.scratch import Scratch

_TINY = 1e-300


@dataclass(slots=True)
class TensorSlots:
    """What is known of each slot; every tensor has shape (P,), float64."""

    names: tuple[str, ...]  # canonical names in the prior
    modules: tuple[str, ...]
    alphas: tuple[float, ...]  # without the schedule's factor
    alpha: Tensor  # the same
    mllm_norm: Tensor  # |theta_mllm| as the prior recorded it
    delta_sq: Tensor  # sum of delta*delta of what is added; 0 where it is another at each step
    whole_sq: Tensor  # sum of delta*delta of the prior's whole tensor
    aim_sq: Tensor  # of what the weights that are trained would have to move

    def to(self, device: torch.device) -> None:
        """Move to where the gradients are."""
        for name in ("alpha", "mllm_norm", "delta_sq", "whole_sq", "aim_sq"):
            setattr(self, name, getattr(self, name).to(device))


@dataclass(frozen=True, slots=True, eq=False)
class _Batch:
    """Pieces of whole slots that are measured before any of them is biased."""

    pieces: tuple[Piece, ...]
    rows: slice | Tensor  # their slots
    places: Mapping[int, int]  # slot -> its number among these rows
    is_fixed: bool  # delta is the same at every step


class Injector:
    """Biases the gradients of all pieces, once a call."""

    def __init__(
        self,
        pieces: Sequence[Piece],
        slots: TensorSlots,
        rule: Rule,
        until: float | None = None,
    ) -> None:
        """Take over pieces and slots.

        Args:
            pieces: of this rank.
            slots: of all ranks.
            rule: gives the coefficients.
            until: a tensor that has come this share of its way is not pulled.
        """
        self.pieces, self.slots, self.rule, self.until = tuple(pieces), slots, rule, until
        self.start = torch.zeros_like(slots.alpha)  # theta_0 * delta, for `until`
        self.missing: set[Piece] = set()  # without a gradient at the last step
        self._scatter_add = ScatterAdd()
        self._norms: dict[_Batch, tuple[Tensor, Tensor]] = {}
        self._groups = _by_group(self.pieces)
        self._known_batches: list[tuple[ProcessGroup | None, list[_Batch]]] | None
        self.to(slots.alpha.device)

    def to(self, device: torch.device, *, cut: str | None = None) -> None:
        """Work on the device where the gradients are.

        Args:
            device: of the sums, and of nearly all gradients.
            cut: "slot" or "layer": bias each before the next one is measured, since delta passes
                through the device's memory but once.
        """
        self.device = device
        self.slots.to(device)
        self.start = self.start.to(device)
        self._norms.clear()
        self._scratch = Scratch(device)
        self._kernels = LazyKernels(device, sum(piece.numel for piece in self.pieces))
        self._runs: dict[Piece, Run] = {}  # of the batch at hand
        shape = (len(self.slots.names), COLUMNS)
        self.sums = torch.zeros(shape, dtype=torch.float64, device=device)  # of the last step
        self.strength = torch.zeros(shape[0], dtype=torch.float64, device=device)  # alpha * c
        self.arrived = torch.zeros(shape[0], dtype=torch.bool, device=device)  # at the last step
        self._cut_by, self._known_batches = cut, None

    @property
    def _batches(self) -> list[tuple[ProcessGroup | None, list[_Batch]]]:
        """What is measured before any of it is biased; cut when the device is known for good."""
        if self._known_batches is None:
            size = 1 if self._cut_by == "slot" else self._kernels.batch_elements
            by_layer = self._cut_by == "layer"
            self._known_batches = [
                (group, list(_cut(own, size if group is None else None, self.device, by_layer)))
                for group, own in self._groups
            ]
        return self._known_batches

    def set_norms(self, delta_sq: Tensor, whole_sq: Tensor, aim_sq: Tensor) -> None:
        """Take over what `positions` has measured of delta, each of shape (P,)."""
        self.slots.delta_sq, self.slots.whole_sq, self.slots.aim_sq = delta_sq, whole_sq, aim_sq
        self._norms.clear()

    def positions(self) -> Tensor:
        """theta*delta in column DOT and delta*delta in column DELTA_SQ, shape (P, COLUMNS)."""
        sums = torch.zeros_like(self.sums)
        with torch.no_grad():
            for group, batches in self._batches:
                for batch in batches:
                    for piece in batch.pieces:
                        self._scatter_add.add(sums, piece.position(self._scratch))
                _reduce(sums, batches, group)
        return sums

    def apply(self, factor: float, scale: float | Tensor | None = None) -> None:
        """Bias all gradients.

        Args:
            factor: the schedule's, for this step.
            scale: what gradients are still multiplied with; None for 1.
        """
        self.missing.clear()
        # One thread gives the orders and torch's own threads share each: Python threads, of which
        # one gives orders at a time, take a fifth longer.
        with torch.no_grad():
            for group, batches in self._batches:
                for batch in batches:
                    self._measure(batch)
                    _reduce(self.sums, [batch], group)
                    self._bias(batch, factor, scale)

    def _measure(self, batch: _Batch) -> None:
        cells = []
        self._scratch.forget()
        self.sums[batch.rows] = 0.0
        kernels = self._kernels.get()
        self._runs.clear()
        for piece in batch.pieces:
            run = None if kernels is None else piece.run(self.device)
            if run is not None:
                self._runs[piece] = run
                continue
            found = piece.measure(self._scratch)
            if found is None:
                self.missing.add(piece)
            cells += found or []
        self._scatter_add.add(self.sums, cells)
        if kernels is not None and self._runs:
            kernels.sums(list(self._runs.values()), self.sums)

    def _bias(self, batch: _Batch, factor: float, scale: float | Tensor | None) -> None:
        rows, slots = batch.rows, self.slots
        if scale is not None:
            self.sums[rows, GRAD_SQ] /= scale * scale
            self.sums[rows, DOT] /= scale
        delta_norm, mllm_norm = self._norms_of(batch)
        sums = Sums(self.sums[rows, GRAD_SQ], self.sums[rows, DOT], delta_norm, mllm_norm)
        strength = self.rule(sums) * slots.alpha[rows] * factor
        if self.until is not None:
            moved = (self.sums[rows, PLACE] - self.start[rows]) * slots.alpha[rows].sign()
            self.arrived[rows] = moved >= self.until * slots.aim_sq[rows]
            strength = strength.masked_fill(self.arrived[rows], 0.0)
        self.strength[rows] = strength
        strength = strength if scale is None else strength * scale
        # Bit for bit: g - 0 * delta would lose the sign of a zero.
        pieces = [p for p in batch.pieces if factor * slots.alphas[p.slot] != 0.0]
        self._bias_runs(pieces, batch, strength)
        rest = [piece for piece in pieces if piece not in self._runs]
        coefficients = strength.unbind() if rest else ()
        is_cpu = self.device.type == "cpu"  # on which the last piece is still in the cache
        for piece in reversed(rest) if is_cpu else rest:
            piece.bias(coefficients[batch.places[piece.slot]], self._scratch)

    def _bias_runs(self, pieces: Sequence[Piece], batch: _Batch, strength: Tensor) -> None:
        """Bias those that kernels have measured."""
        kernels = self._kernels.get()
        runs = {piece: self._runs[piece] for piece in pieces if piece in self._runs}
        if kernels is None or not runs:
            return
        coefficients = torch.zeros_like(self.strength)
        coefficients[batch.rows] = strength
        kernels.bias(list(runs.values()), coefficients)
        for piece, run in runs.items():
            piece.put(run)

    def _norms_of(self, batch: _Batch) -> tuple[Tensor, Tensor]:
        """|delta| of what is added, and the |theta| that belongs to it."""
        if batch in self._norms:
            return self._norms[batch]
        rows, slots = batch.rows, self.slots
        delta_norm = (slots.delta_sq[rows] + self.sums[rows, DELTA_SQ]).sqrt()
        # Where a part of delta is added, or a projection of it, |theta| shrinks in proportion:
        # their ratio, the strength of `absolute_param_norm`, is that of the whole tensor.
        share = delta_norm / slots.whole_sq[rows].sqrt().clamp(min=_TINY)
        norms = (delta_norm, slots.mllm_norm[rows] * share)
        if batch.is_fixed:
            self._norms[batch] = norms
        return norms


def _by_group(pieces: Sequence[Piece]) -> list[tuple[ProcessGroup | None, list[Piece]]]:
    groups: dict[int, tuple[ProcessGroup | None, list[Piece]]] = {}
    for piece in pieces:
        group = piece.group
        groups.setdefault(id(group), (group, []))[1].append(piece)
    return list(groups.values())


def _cut(
    pieces: Sequence[Piece], size: int | None, device: torch.device, by_layer: bool
) -> Iterator[_Batch]:
    """Batches of about `size` elements, of a layer, or one; slots and ties stay together."""
    batch: list[Piece] = []
    numel = 0
    for piece in sorted(pieces, key=lambda piece: piece.slot):
        is_tied = bool(batch) and (piece.slot == batch[-1].slot or piece.tie == batch[-1].tie)
        is_full = size is not None and numel + piece.numel > size
        if batch and by_layer:
            is_full = piece.layer != batch[-1].layer
        if batch and is_full and not is_tied:
            yield _batch(batch, device)
            batch, numel = [], 0
        batch.append(piece)
        numel += piece.numel
    if batch:
        yield _batch(batch, device)


def _batch(pieces: Sequence[Piece], device: torch.device) -> _Batch:
    slots = sorted({piece.slot for piece in pieces})
    is_run = slots[-1] - slots[0] + 1 == len(slots)
    rows = slice(slots[0], slots[-1] + 1) if is_run else torch.tensor(slots, device=device)
    places = {slot: number for number, slot in enumerate(slots)}
    return _Batch(tuple(pieces), rows, places, all(piece.is_fixed for piece in pieces))


def _reduce(sums: Tensor, batches: Sequence[_Batch], group: ProcessGroup | None) -> None:
    """Add up the rows of these batches over the ranks of a group."""
    if group is None:
        return
    (batch,) = batches
    local_sums = sums[batch.rows].contiguous()
    torch.distributed.all_reduce(local_sums, group=group)
    sums[batch.rows] = local_sums
