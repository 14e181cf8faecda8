"""Memory for a step, made once and used again: what is computed, and deltas that are read twice.

Shapes: a chunk is flat, n elements.
"""

import torch
from torch import Tensor

# Elements. Smaller chunks stay in a smaller cache, but cost more in calls: 2**17 a tenth more.
CPU_GRADIENT_CHUNK = 2**19
GPU_GRADIENT_CHUNK = 2**23
_KEPT = 2**21  # elements of widened deltas that are kept on a CPU from the first pass to the second


class Scratch:
    """Buffers on one device, made once however large the tensors are."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.elements = CPU_GRADIENT_CHUNK if device.type == "cpu" else GPU_GRADIENT_CHUNK
        self._buffers: dict[tuple[str, torch.dtype], Tensor] = {}
        self._kept: dict[tuple[object, int], Tensor] = {}
        self._used = 0  # elements of the buffer of kept deltas
        self._others: dict[torch.device, Scratch] = {}

    def at(self, device: torch.device) -> "Scratch":
        """The same on another device, where a model lies on several."""
        if device == self.device:
            return self
        if device not in self._others:
            self._others[device] = Scratch(device)
        return self._others[device]

    def get(self, name: str, numel: int, dtype: torch.dtype, *, capacity: int = 0) -> Tensor:
        """The first `numel` elements of a buffer, which holds `capacity` at least."""
        buffer = self._buffers.get((name, dtype))
        if buffer is None or buffer.numel() < numel:
            size = max(numel, capacity, self.elements)
            buffer = torch.empty(size, dtype=dtype, device=self.device)
            self._buffers[name, dtype] = buffer
        return buffer[:numel]

    def keep(self, key: tuple[object, int], numel: int, dtype: torch.dtype) -> Tensor:
        """Memory for a delta; `kept` finds it again until `forget`, if there was room for it."""
        room = _KEPT if self.device.type == "cpu" else 0
        if self._used + numel > room:
            return self.get("delta", numel, dtype)
        whole = self.get("kept", room, dtype, capacity=room)
        self._kept[key] = whole[self._used : self._used + numel]
        self._used += numel
        return self._kept[key]

    def kept(self, key: tuple[object, int]) -> Tensor | None:
        """A delta that was kept."""
        return self._kept.get(key)

    def forget(self) -> None:
        """Start anew with what is kept."""
        self._kept.clear()
        self._used = 0
        for other in self._others.values():
            other.forget()


def computed(stored: Tensor, scratch: Scratch) -> Tensor:
    """A chunk of gradients or weights in the dtype of the arithmetic; itself where it has it."""
    dtype = torch.float64 if stored.dtype == torch.float64 else torch.float32
    if stored.dtype == dtype:
        return stored
    return scratch.get("wide", stored.numel(), dtype).copy_(stored)
