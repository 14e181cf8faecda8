"""The streams and events of a device, as streaming needs them; nothing to wait for on a CPU.

Order is kept by events alone: what is queued on one stream waits for what was queued on another
only where `wait` says so, and the host waits only in `synchronize`.
"""

from typing import Any, Protocol

import torch
from torch import Tensor


class Queues(Protocol):
    """Two streams of a device: the main one, which trains, and one for copies."""

    def host_buffer(self, size_bytes: int) -> Tensor:
        """Host memory that a device can read while the host goes on; flat, uint8."""

    def device_buffer(self, size_bytes: int) -> Tensor:
        """Memory of the device; flat, uint8."""

    def mark(self) -> Any:
        """An event after all that the main stream has been given so far."""

    def copy(self, host: Tensor, device: Tensor, after: Any) -> Any:
        """Queue a copy on the side stream, after an event; return the event of its end."""

    def wait(self, event: Any) -> None:
        """Have the main stream wait for an event; the host goes on."""

    def synchronize(self, event: Any) -> None:
        """Have the host wait for an event."""

    def drain(self) -> None:
        """Have the host wait for all that the side stream was given."""


class CudaQueues:
    """Those of a GPU."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._side: Any = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def host_buffer(self, size_bytes: int) -> Tensor:
        """Pinned memory."""
        return torch.empty(size_bytes, dtype=torch.uint8, pin_memory=True)

    def device_buffer(self, size_bytes: int) -> Tensor:
        """Memory that the side stream writes to: its allocator knows, until `drain`."""
        buffer = torch.empty(size_bytes, dtype=torch.uint8, device=self._device)
        buffer.record_stream(self._side)
        return buffer

    def mark(self) -> Any:
        """As `Queues.mark`."""
        event: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))
        return event

    def copy(self, host: Tensor, device: Tensor, after: Any) -> Any:
        """As `Queues.copy`."""
        with torch.cuda.stream(self._side):
            self._side.wait_event(after)
            device.copy_(host, non_blocking=True)
            event: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(self._side)
        return event

    def wait(self, event: Any) -> None:
        """As `Queues.wait`."""
        torch.cuda.current_stream(self._device).wait_event(event)

    def synchronize(self, event: Any) -> None:
        """As `Queues.synchronize`."""
        event.synchronize()

    def drain(self) -> None:
        """As `Queues.drain`."""
        self._side.synchronize()


class HostQueues:
    """A device that is the host: whatever is queued is done at once."""

    def host_buffer(self, size_bytes: int) -> Tensor:
        """Plain memory."""
        return torch.empty(size_bytes, dtype=torch.uint8)

    device_buffer = host_buffer

    def mark(self) -> None:
        """Nothing is pending."""

    def copy(self, host: Tensor, device: Tensor, after: Any) -> None:
        """Copy now."""
        device.copy_(host)

    def wait(self, event: Any) -> None:
        """Nothing to wait for."""

    synchronize = wait

    def drain(self) -> None:
        """Nothing is pending."""


def queues_of(device: torch.device) -> Queues:
    """The streams of a device."""
    return CudaQueues(device) if device.type == "cuda" else HostQueues()
