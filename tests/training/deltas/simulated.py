"""A device whose two streams run as late, and in as unkind an order, as events allow.

The main stream's work is caught by a dispatch mode: in-place operations are queued, views are not
work. Whatever else touches a device's memory is an error here.
"""

import random
import threading
from collections import deque

import torch
from torch.utils._python_dispatch import TorchDispatchMode

SCHEDULES = ("main", "side", "random")  # which stream is favored


class FakeMemory:
    """Of 80 GB that torch could hold, so many were held at the peak."""

    def __init__(self, peak, whole=80 * 10**9):
        self.peak, self.whole = peak, whole

    def whole_bytes(self):
        return self.whole

    def peak_bytes(self):
        return self.peak


class Event:
    def __init__(self):
        self.is_done = False


class SimulatedQueues:
    """`deltas.queues.Queues` without a device."""

    def __init__(self, schedule, seed=0):
        self._schedule, self._random = schedule, random.Random(seed)
        self._streams = {"main": deque(), "side": deque()}
        self._lock = threading.RLock()
        self.buffers = []  # of the device

    def host_buffer(self, size):
        return torch.zeros(size, dtype=torch.uint8)

    def device_buffer(self, size):
        self.buffers.append(torch.zeros(size, dtype=torch.uint8))
        return self.buffers[-1]

    def mark(self):
        return self._record("main")

    def copy(self, host, device, after):
        with self._lock:
            self._streams["side"].append(("wait", after))
            self._streams["side"].append(("do", lambda: device.copy_(host)))
            return self._record("side")

    def wait(self, event):
        with self._lock:
            self._streams["main"].append(("wait", event))

    def synchronize(self, event):
        self._run(lambda: event.is_done)

    def drain(self):
        self._run(lambda: not self._streams["side"])

    def queue(self, work):
        """Give the main stream work."""
        with self._lock:
            self._streams["main"].append(("do", work))

    def finish(self):
        """Run everything that is left."""
        self._run(lambda: not any(self._streams.values()))

    def _record(self, stream):
        event = Event()
        with self._lock:
            self._streams[stream].append(("record", event))
        return event

    def _run(self, is_over):
        with self._lock:
            while not is_over():
                ready = [name for name in self._streams if self._is_ready(name)]
                assert ready, "a deadlock: both streams wait"
                favored = self._schedule if self._schedule in ready else None
                kind, what = self._streams[favored or self._random.choice(ready)].popleft()
                if kind == "do":
                    what()
                elif kind == "record":
                    what.is_done = True

    def _is_ready(self, name):
        if not self._streams[name]:
            return False
        kind, what = self._streams[name][0]
        return kind != "wait" or what.is_done


class OnDevice(TorchDispatchMode):
    """What this thread does with tensors is work of the main stream."""

    def __init__(self, queues):
        super().__init__()
        self._queues = queues

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        schema = func._schema
        if schema.is_mutable:
            self._queues.queue(lambda: func(*args, **(kwargs or {})))
            return args[0]
        is_view = any(r.alias_info is not None for r in schema.returns)
        makes = not any(isinstance(arg, torch.Tensor) for arg in args)
        assert is_view or makes, f"{schema.name} reads a device's memory at once"
        return func(*args, **(kwargs or {}))


# Each lacks one of the four orders that are kept; a test that does not kill it proves nothing.
class UsedIsNotWaitedFor(SimulatedQueues):
    def mark(self):
        event = Event()
        event.is_done = True
        return event


class ArrivedIsNotWaitedFor(SimulatedQueues):
    def wait(self, event):
        pass


class PinnedMemoryIsFilledTooEarly(SimulatedQueues):
    def synchronize(self, event):
        pass


class CloseDoesNotDrain(SimulatedQueues):
    def drain(self):
        pass


MUTANTS = (
    UsedIsNotWaitedFor,
    ArrivedIsNotWaitedFor,
    PinnedMemoryIsFilledTooEarly,
    CloseDoesNotDrain,
)
