"""Deltas that pass through a ring in the device's memory, the next ones on their way.

Stored bytes travel. Several threads read the map into pinned memory, one gives orders to a side
stream of the device. The ring is full when a step begins: what comes first is sent for as soon as
the step before is over, while the forward and backward passes run.
"""

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from drift_merge.training.deltas.files import Direct
from drift_merge.training.deltas.packed import Packing, Packs, Regions
from drift_merge.training.deltas.queues import Queues, queues_of
from drift_merge.training.units import Block, Region, Unit

_RING = 3  # units on the device: the one in use and two on their way
_MOST_ORDERS = 4  # as often as a step goes through all units, reports included
_READERS = 4  # one thread copies from the page cache at a tenth of what PCIe 5 carries


@dataclass(slots=True)
class _Slot:
    """One place of the ring: pinned host memory, memory of the device, and who is in it."""

    host: Tensor
    device: Tensor
    arrived: Any = None  # event of the side stream: the copy is complete
    used: Any = None  # event of the main stream: nothing queued before it reads the slot later
    unit: Unit | None = None
    filling: "Future[None] | None" = None
    turn: int = 0  # when it was last asked for


@dataclass(slots=True)
class _Order:
    """Which units come after which: the order of the step before, at first that of the regions.

    Pieces that share a slot are all measured before one of them is biased, sharded ones all of
    them; so the order is watched, not told.
    """

    known: list[Unit]
    most: int  # units to remember
    seen: list[Unit] = field(default_factory=list)

    def note(self, unit: Unit) -> None:
        """A unit is asked for; again and again counts once."""
        if len(self.seen) >= self.most:
            self.end()  # with when="microbatch" nobody says when a step is over
        if not self.seen or self.seen[-1] is not unit:
            self.seen.append(unit)

    def end(self) -> None:
        """The step is over."""
        if self.seen:
            self.known, self.seen = self.seen, []

    def after(self, count: int) -> list[Unit]:
        """The next units, without repetition, if this step goes on as the one before."""
        at = len(self.seen)
        if self.seen and self.known[(at - 1) % len(self.known)] is not self.seen[-1]:
            at = next((i for i, u in enumerate(self.known, 1) if u is self.seen[-1]), at)
        order = self.known[at % len(self.known) :] + self.known[: at % len(self.known)]
        return list(dict.fromkeys(order))[:count]


class StreamedDeltas:
    """A few units on the device at a time."""

    def __init__(
        self, packs: Packs, regions: Regions, device: torch.device, queues: Queues | None = None
    ) -> None:
        self._packs, self._regions = packs, dict(regions)
        self._queues = queues_of(device) if queues is None else queues
        self._packings = {unit: packs.packing(unit, region) for unit, region in regions.items()}
        self._order = _Order(list(regions), _MOST_ORDERS * len(regions))
        self._turn = 0
        largest = max((one.size_bytes for one in self._packings.values()), default=0)
        self._slots = [
            _Slot(self._queues.host_buffer(largest), self._queues.device_buffer(largest))
            for _ in range(min(_RING, len(self._regions)))
        ]
        # Reading the map takes cores for a while; the training loop must not wait for it.
        single = partial(torch.set_num_threads, 1)  # each reader is a thread already
        self._orders = ThreadPoolExecutor(1, "drift_merge", initializer=single)
        self._readers = ThreadPoolExecutor(_READERS, "drift_merge", initializer=single)

    @property
    def ring_bytes(self) -> int:
        """Memory of the device that the ring takes."""
        return sum(slot.device.numel() for slot in self._slots)

    def factors(self, unit: Unit, block: Block, like: Tensor) -> None:
        """None: what is here are values."""

    def chunk(self, unit: Unit, begin: int, block: Block, out: Tensor) -> None:
        """Expand a chunk of the unit that is on the device."""
        packing, buffer = self.packed(unit)
        packing.expand(buffer, begin, block, out)

    def direct(self, unit: Unit, region: Region) -> Direct | None:
        """None: a place of the ring is given away before kernels of several units have run."""
        return None

    def rows(self, unit: Unit, first: int, end: int) -> Tensor:
        """Rows of the unit that is on the device; to be used before another unit is asked for."""
        packing, buffer = self.packed(unit)
        return packing.rows(buffer, unit, first, end)

    def packed(self, unit: Unit) -> tuple[Packing, Tensor]:
        """A unit on the device, as `Resident.packed`; until two others are asked for."""
        self._order.note(unit)
        slot = self._slot_of(unit) or self._send(unit)
        self._turn += 1
        slot.turn = self._turn
        if slot.filling is not None:
            slot.filling.result()
            slot.filling = None
            self._queues.wait(slot.arrived)
            self._send_ahead(keep=slot)
        return self._packings[unit], slot.device

    def end_step(self) -> None:
        """Send for what the next step begins with."""
        self._order.end()
        self._send_ahead(keep=None)

    def close(self) -> None:
        """Wait until nothing is on its way any more: memory may be given back then."""
        self._orders.shutdown()  # waits for what was submitted
        self._readers.shutdown()
        self._queues.drain()
        self._slots = []

    def _slot_of(self, unit: Unit) -> _Slot | None:
        return next((slot for slot in self._slots if slot.unit is unit), None)

    def _send_ahead(self, keep: _Slot | None) -> None:
        """Send for the next units, as many as there are places besides the one in use."""
        coming = self._order.after(len(self._slots) - (keep is not None))
        for unit in coming:
            if self._slot_of(unit) is None:
                self._send(unit, kept={id(keep), *(id(self._slot_of(one)) for one in coming)})

    def _send(self, unit: Unit, kept: set[int] | None = None) -> _Slot:
        """Read a unit into pinned memory and copy it to the device, behind the caller's back."""
        free = [slot for slot in self._slots if id(slot) not in (kept or ())]
        slot = min(free, key=lambda slot: slot.turn)  # unused for the longest time
        if slot.filling is not None:
            slot.filling.result()
        slot.used = self._queues.mark()
        slot.unit = unit
        slot.filling = self._orders.submit(self._carry, unit, slot)
        return slot

    def _carry(self, unit: Unit, slot: _Slot) -> None:
        size = self._packings[unit].size_bytes
        if slot.arrived is not None:
            self._queues.synchronize(slot.arrived)  # the pinned memory is still copied from
        self._packs.pack(unit, self._regions[unit], slot.host, self._readers)
        slot.arrived = self._queues.copy(slot.host[:size], slot.device[:size], slot.used)
