"""A CPU platform for verl, which ships CUDA and NPU only. Imported by verl itself."""

import contextlib
import types
from typing import Any

import torch
from verl.plugin.platform.platform_base import PlatformBase
from verl.plugin.platform.platform_manager import PlatformRegistry

_NOTHING = ("memory_allocated", "memory_reserved", "max_memory_allocated", "max_memory_reserved")
_DEVICE = types.SimpleNamespace(
    **{name: lambda *_, **__: 0 for name in (*_NOTHING, "empty_cache", "synchronize")},
    current_device=lambda: "cpu",
    mem_get_info=lambda *_: (1, 1),
    get_rng_state=lambda *_: torch.get_rng_state(),
    set_rng_state=lambda state, *_: torch.set_rng_state(state),
    manual_seed=torch.manual_seed,
)


class Cpu(PlatformBase):
    device_name = vendor_name = "cpu"
    device_module = _DEVICE

    def is_available(self) -> bool:
        return True

    def current_device(self) -> str:
        return "cpu"

    def device_count(self) -> int:
        return 1

    def communication_backend_name(self) -> str:
        return "gloo"

    def nvtx_range(self, msg: str) -> Any:
        return contextlib.nullcontext()

    def manual_seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    manual_seed_all = manual_seed

    def _nothing(self, *_: Any) -> None:
        return None

    set_device = synchronize = set_allocator_settings = empty_cache = _nothing
    profiler_start = profiler_stop = cudart = _nothing


Cpu.__abstractmethods__ = frozenset()  # what only accelerators have
PlatformRegistry._platforms["cpu"] = Cpu
