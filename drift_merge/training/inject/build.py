"""Sets the injection up: a slot for each tensor of the prior, a gradient for each matched unit."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch

from drift_merge.errors import CheckpointError, RecipeError
from drift_merge.storage.measured import TensorRecord
from drift_merge.training.gradients.hooks import parameters_of
from drift_merge.training.gradients.layout import GradientLayout
from drift_merge.training.inject.adapted import AdaptedPiece
from drift_merge.training.inject.injector import TensorSlots
from drift_merge.training.inject.pieces import DensePiece, Piece
from drift_merge.training.inject.uses import DeltaUse
from drift_merge.training.match.matching import Matching
from drift_merge.training.units import Region, Unit


@dataclass(frozen=True, slots=True)
class BuiltPieces:
    """Slots and pieces of a matching."""

    slots: TensorSlots
    pieces: tuple[Piece, ...]
    regions: dict[Unit, Region]  # of this rank, in the order of use


def build(
    matching: Matching,
    entries: Mapping[str, TensorRecord],
    layout: GradientLayout,
    alphas: Mapping[str, float],
    use: DeltaUse | None = None,
) -> BuiltPieces:
    """Make a slot for each tensor of the prior, and a piece for what this rank holds of it.

    Args:
        matching: the units.
        entries: the manifest's tensors by canonical name.
        layout: where gradients lie.
        alphas: strength by module.
        use: what the rule uses of delta; all of it by default.

    Raises:
        CheckpointError: the prior holds NaN or Inf.
        RecipeError: an adapter under a rule that needs the weights themselves.
    """
    numbers: dict[str, int] = {}
    pieces: list[Piece] = []
    regions: dict[Unit, Region] = {}
    adapted: dict[tuple[int, str], list[Unit]] = {}
    for unit in matching.units:
        slot = numbers.setdefault(unit.name, len(numbers))
        if unit.is_adapted:
            adapted.setdefault((slot, unit.parameter_name), []).append(unit)
            regions[unit] = Region(flat=(0, unit.numel))
            continue
        region = layout.region(unit)
        pieces.append(DensePiece(unit, slot, region, layout, use))
        if region is not None:
            regions[unit] = region
    for (slot, name), units in adapted.items():
        pieces.append(AdaptedPiece(units, slot, matching.adapted[name], layout, use))
    names = tuple(numbers)
    return BuiltPieces(_slots(names, matching.units, alphas, entries), tuple(pieces), regions)


def partial_slots(
    names: Sequence[str], units: Sequence[Unit], entries: Mapping[str, TensorRecord]
) -> list[bool]:
    """Which slots hold only a part of their tensor, since the rest of it is frozen."""
    held: dict[str, int] = {}
    for unit in units:
        held[unit.name] = held.get(unit.name, 0) + unit.numel
    return [held[name] < prod(entries[name]["shape"]) for name in names]


def units_by_optimizer(
    matching: Matching, optimizers: Sequence[torch.optim.Optimizer]
) -> list[tuple[Unit, ...]]:
    """The units that each optimizer steps.

    Raises:
        RecipeError: a tensor of the prior is spread over several; it has one coefficient.
    """
    owners = {id(p): number for number, one in enumerate(optimizers) for p in parameters_of(one)}
    groups: list[list[Unit]] = [[] for _ in optimizers]
    owner_of: dict[str, int] = {}
    for unit in matching.units:
        held = [unit.parameter]
        if unit.is_adapted:
            held = [factor.parameter for factor in matching.adapted[unit.parameter_name].factors]
        numbers = {owners[id(parameter)] for parameter in held}
        number = min(numbers)
        if len(numbers) > 1 or owner_of.setdefault(unit.name, number) != number:
            raise RecipeError(
                f"{unit.name} of the prior is spread over several optimizers, but has one"
                " coefficient.",
                remedy="Give all its parts (the factors of an adapter; q, k and v of a fused"
                " tensor) to one optimizer.",
            )
        groups[number].append(unit)
    return [tuple(units) for units in groups]


def _slots(
    names: tuple[str, ...],
    units: Sequence[Unit],
    alphas: Mapping[str, float],
    entries: Mapping[str, TensorRecord],
) -> TensorSlots:
    module_of = {unit.name: unit.module for unit in units}
    values = tuple(alphas[module_of[name]] for name in names)
    norms = _mllm_norms(names, entries)
    return TensorSlots(
        names=names,
        modules=tuple(module_of[name] for name in names),
        alphas=values,
        alpha=torch.tensor(values, dtype=torch.float64),
        mllm_norm=torch.tensor(norms, dtype=torch.float64),
        delta_sq=torch.zeros(len(names), dtype=torch.float64),
        whole_sq=torch.zeros(len(names), dtype=torch.float64),
        aim_sq=torch.zeros(len(names), dtype=torch.float64),
    )


def _mllm_norms(names: Sequence[str], entries: Mapping[str, TensorRecord]) -> list[float]:
    """|theta_mllm| of every tensor; refuse those that hold NaN or Inf."""
    norms = {name: entries[name]["norm_mllm"] for name in names}
    bad = [name for name, norm in norms.items() if norm is None or "nonfinite" in entries[name]]
    if bad:
        raise CheckpointError(
            f"{len(bad):,} deltas of the prior hold NaN or Inf, e.g. {bad[0]}: they would spoil"
            " every gradient.",
            remedy="Compute the prior from sound checkpoints, or leave these modules out.",
        )
    return [norms[name] or 0.0 for name in names]
