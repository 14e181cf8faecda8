"""Steps that were biased but not taken, since GradScaler or DeepSpeed found Inf."""

from typing import Any

import torch
from torch import Tensor


class Skips:
    """Counts skipped steps without waiting for the device within the step."""

    def __init__(self) -> None:
        self._total = 0
        self._pending: list[tuple[Tensor, Any]] = []  # found_inf on the host, event of its copy

    def add(self) -> None:
        """Count the step that has just been skipped."""
        self._total += 1

    def note(self, found_inf: Tensor | None) -> None:
        """Take down whether a fused optimizer will skip the next step: only the device knows."""
        if found_inf is None:
            return
        if found_inf.device.type == "cpu":
            self._pending.append((found_inf.detach().clone(), None))
            return
        host = torch.empty(found_inf.shape, dtype=found_inf.dtype, pin_memory=True)
        host.copy_(found_inf.detach(), non_blocking=True)
        event: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        self._pending.append((host, event))

    def total(self) -> int:
        """Steps skipped so far; at the next step the copies have long arrived."""
        for found, event in self._pending:
            if event is not None:
                event.synchronize()
            self._total += bool(found.any())
        self._pending.clear()
        return self._total
