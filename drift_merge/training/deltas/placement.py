"""Chooses where deltas wait: in the mapped files, resident on the GPU, shared out, or streamed.

On a CPU the map of the prior's files is read directly. For gradients on a GPU all regions of this
rank are made resident there if they fit beside what training needs at its peak. If they do not,
ranks of DDP hold 1/N each and gather layer by layer; else a few units at a time pass through.
"""

from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch.distributed import ProcessGroup

from drift_merge.training.deltas.factored import WithFactors
from drift_merge.training.deltas.files import DeltaSource, FileDeltas
from drift_merge.training.deltas.gathered import GatheredDeltas
from drift_merge.training.deltas.held import Resident
from drift_merge.training.deltas.packed import Packs, Regions, packs_of
from drift_merge.training.deltas.streamed import StreamedDeltas

_HEADROOM = 0.9  # of the memory that is free at the peak; fragments need the rest
KINDS = ("streamed", "gathered", "resident")  # the more memory the later; ranks take the least


class Memory(Protocol):
    """What a device's memory is used for."""

    def whole_bytes(self) -> int:
        """What torch can hold at most: what it has, and what is free on the device."""

    def peak_bytes(self) -> int:
        """The most that was held at once: weights, gradients and the activations of a pass."""


class CudaMemory:
    """The memory of a GPU."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def whole_bytes(self) -> int:
        """As `Memory.whole_bytes`."""
        free, _ = torch.cuda.mem_get_info(self._device)
        return int(free) + torch.cuda.memory_reserved(self._device)

    def peak_bytes(self) -> int:
        """As `Memory.peak_bytes`; before a step activations are freed, but the next pass comes."""
        return torch.cuda.max_memory_allocated(self._device)


@dataclass(frozen=True, slots=True)
class Placement:
    """Where deltas wait, and why."""

    source: DeltaSource
    kind: str  # "mapped", or one of KINDS
    step_bytes: int  # that travel to this rank's device in a step; on a CPU, that are read
    text: str  # one line for a log


def mapped(source: DeltaSource, size_bytes: int, device: torch.device) -> Placement:
    """Delta stays where it is, in mapped files."""
    text = (
        f"delta is read from mapped files, {_gb(size_bytes)} a step: gradients are on the"
        f" {'CPU' if device.type == 'cpu' else device}"
    )
    return Placement(source, "mapped", size_bytes, text)


def place(
    source: FileDeltas | Resident,
    regions: Regions,
    device: torch.device,
    *,
    wanted: str,
    state_bytes: int,
    passes: int = 1,
    group: ProcessGroup | None = None,
    memory: Memory | None = None,
) -> Placement:
    """Choose where deltas wait.

    Args:
        source: of the priors' files, or of a file that `refresh` made.
        regions: the region of every unit on this rank, in the order of use.
        device: where gradients lie.
        wanted: one of `training.options.DEVICES`.
        state_bytes: what the optimizer will still allocate on the device.
        passes: how often a step goes through all of delta: 2 where a group is waited for.
        group: ranks that have the same whole gradients (DDP) and choose together.
        memory: of the device; by default that of a GPU.
    """
    packs = source if isinstance(source, Resident) else packs_of(source)
    files = source if isinstance(source, FileDeltas) else None
    by_factors = {unit: files.factor_bytes(unit) for unit in regions} if files else {}
    whole = {unit: region for unit, region in regions.items() if not by_factors.get(unit)}
    size = sum(packs.packing(unit, region).size_bytes for unit, region in whole.items())
    if memory is None:
        if device.type != "cuda":
            return mapped(source, passes * (size + sum(by_factors.values())), device)
        memory = CudaMemory(device)
    ranks = 1 if group is None else torch.distributed.get_world_size(group)
    room = int(_HEADROOM * (memory.whole_bytes() - memory.peak_bytes())) - state_bytes
    kind = _agreed(_kind(wanted, size, room, ranks), device, group)
    why = (
        f"{_gb(max(room, 0))} are free beside the peak of activations ({_gb(memory.peak_bytes())}"
        f" in use then) and {_gb(state_bytes)} of optimizer state to come"
        if wanted == "auto"
        else f"device={wanted!r} was asked for"
    )
    said = f"{_gb(size)} in all; {why}"
    placed = _placed(kind, packs, whole, device, group, said, passes * size)
    if files is None or len(whole) == len(regions):
        return placed
    said = f"{placed.text}; beside it {_gb(sum(by_factors.values()))} of factors"
    return replace(placed, source=WithFactors(placed.source, files), text=said)


def _kind(wanted: str, size: int, room: int, ranks: int) -> str:
    if wanted != "auto":
        return "resident" if wanted == "cuda" else "streamed"
    if size <= room:
        return "resident"
    return "gathered" if ranks > 1 and size / ranks <= room else "streamed"


def _agreed(kind: str, device: torch.device, group: ProcessGroup | None) -> str:
    """What all ranks of a group have room for: they gather together or not at all."""
    if group is None:
        return kind
    number = torch.tensor(KINDS.index(kind), device=device)
    torch.distributed.all_reduce(number, op=torch.distributed.ReduceOp.MIN, group=group)
    return KINDS[int(number)]


def _placed(
    kind: str,
    packs: Packs,
    regions: Regions,
    device: torch.device,
    group: ProcessGroup | None,
    why: str,
    step_bytes: int,
) -> Placement:
    if kind == "resident":
        held = Resident.copied(packs, regions, device)
        return Placement(held, kind, 0, f"delta is resident on {device}, 0 bytes a step: {why}")
    if kind == "gathered":
        assert group is not None
        ranks = torch.distributed.get_world_size(group)
        gathered = GatheredDeltas(packs, regions, device, group)
        size = step_bytes * (ranks - 1) // ranks
        text = (
            f"delta is resident in {ranks} shares, {_gb(size)} gathered by {device} a step: {why}"
        )
        return Placement(gathered, kind, size, text)
    streamed = StreamedDeltas(packs, regions, device)
    text = (
        f"delta is streamed to {device}, {_gb(step_bytes)} a step through a ring of"
        f" {_gb(streamed.ring_bytes)}: {why}"
    )
    return Placement(streamed, kind, step_bytes, text)


def _gb(size: int) -> str:
    return f"{size / 1e9:,.2f} GB" if size >= 1e8 else f"{size / 1e6:,.2f} MB"
