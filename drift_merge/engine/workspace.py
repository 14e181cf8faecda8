"""Scratch memory of one worker: from stored bytes to float32 chunks on a device, and back.

All buffers are allocated once and reused; a worker holds a few chunks however large the
tensors are. On a CPU a chunk stays in the cache; on a GPU chunks are larger and pass through
pinned memory, each worker on a stream of its own, so that copies and arithmetic overlap.
"""

import ctypes
import warnings
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from drift_merge.maths.compression import widen

# Measured on a linear merge, 2 MB of cache a core: 2**17 takes a tenth longer (more system calls),
# 2**16 a third, and 2**19 falls out of the cache.
CPU_CHUNK = 2**18
GPU_CHUNK = 2**23

with warnings.catch_warnings():
    # torch warns once per process that a read-only buffer (our maps) must not be written to.
    # Nothing writes to one here; the single warning is spent where nobody sees it.
    warnings.simplefilter("ignore")
    torch.frombuffer(b"\0\0", dtype=torch.int16)


def chunk_elements(device: torch.device) -> int:
    """Elements in one chunk on a device."""
    return CPU_CHUNK if device.type == "cpu" else GPU_CHUNK


class HostBuffer:
    """Host memory seen both as a tensor of any dtype and as bytes; grows, never shrinks."""

    def __init__(self, *, pinned: bool) -> None:
        self._pinned = pinned
        self.held: tuple[object, int, int] | None = None  # what `Inputs.chunk` left here
        self._memory = torch.empty(0, dtype=torch.uint8)

    def tensor(self, dtype: torch.dtype, numel: int) -> Tensor:
        """The first `numel` elements as a flat tensor of `dtype`."""
        self.held = None
        size = numel * dtype.itemsize
        if self._memory.numel() < size:
            self._memory = torch.empty(size, dtype=torch.uint8, pin_memory=self._pinned)
        return self._memory[:size].view(dtype)

    def bytes(self, size: int) -> memoryview:
        """The first `size` bytes; valid until the buffer grows."""
        array = (ctypes.c_char * size).from_address(self._memory.data_ptr())
        return memoryview(array).cast("B")


class Workspace:
    """The buffers of one worker. Not shared between threads."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._is_cpu = device.type == "cpu"
        self._inputs: dict[tuple[int, torch.dtype], Tensor] = {}
        self._scratch: dict[int, HostBuffer] = {}
        self._output = HostBuffer(pinned=not self._is_cpu)
        self._staging: dict[int, HostBuffer] = {}
        self._stream: Any = None if self._is_cpu else torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def on_stream(self) -> AbstractContextManager[Any]:
        """Context in which this worker's device work is queued."""
        return nullcontext() if self._is_cpu else torch.cuda.stream(self._stream)

    def scratch(self, slot: int) -> HostBuffer:
        """Host memory in which input number `slot` is put together, if it is in pieces."""
        return self._scratch.setdefault(slot, HostBuffer(pinned=False))

    def load(self, slot: int, raw: Tensor, compute: torch.dtype) -> Tensor:
        """Copy a flat host tensor to the device in the compute dtype.

        Args:
            slot: number of the input; each has its own buffer.
            raw: flat, in the stored dtype.
            compute: float32 or float64.

        Returns:
            Flat tensor on the device that the caller may overwrite.
        """
        numel = raw.numel()
        buffer = self._inputs.get((slot, compute))
        if buffer is None or buffer.numel() < numel:
            size = max(numel, chunk_elements(self.device))
            buffer = torch.empty(size, dtype=compute, device=self.device)
            self._inputs[slot, compute] = buffer
        target = buffer[:numel]
        if self._is_cpu:
            return widen(raw, target)
        staging = self._staging.setdefault(slot, HostBuffer(pinned=True))
        pinned = staging.tensor(raw.dtype, numel)
        pinned.copy_(raw)
        return target.copy_(pinned.to(self.device, non_blocking=True))

    def store(self, result: Tensor, dtype: torch.dtype) -> tuple[Tensor, memoryview]:
        """Round a result to the output dtype in host memory.

        Returns:
            The rounded host tensor and its bytes; both valid until the next call.
        """
        out = self._output.tensor(dtype, result.numel())
        if self._is_cpu:
            out.copy_(result)
        else:
            out.copy_(result.to(dtype), non_blocking=True)
            self._stream.synchronize()
        return out, self._output.bytes(out.numel() * dtype.itemsize)
