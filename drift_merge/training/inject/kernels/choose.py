"""Which kernels a device gets: Triton's on a GPU, compiled C++ on a CPU, or none.

`DRIFT_MERGE_KERNELS` says otherwise: "loop" for none, "native" for C++ however small the model is.
"""

import os

import torch

from drift_merge.errors import one_of
from drift_merge.training.inject.kernels.native import native_kernels
from drift_merge.training.inject.kernels.runs import Kernels

VARIABLE = "DRIFT_MERGE_KERNELS"
CHOICES = ("auto", "native", "loop")
_WORTH = 2**24  # elements; for fewer a compiler's seconds are not won back
# Elements that are measured together where no group is waited for. The loop's tensors share the
# arithmetic of the rule (about 70 microseconds), while gradients and deltas stay in the last cache.
_CPU_BATCH = 2**21
_GPU_BATCH = 2**26
_ALL = 2**62  # with kernels: a second pass over memory costs less than more orders


class LazyKernels:
    """The kernels of a device, looked for when they are first needed."""

    def __init__(self, device: torch.device, elements: int) -> None:
        """Take the device of the gradients, and how many elements there are on this rank."""
        self._device, self._elements = device, elements
        self._found: tuple[Kernels | None] | None = None

    def get(self) -> Kernels | None:
        """The kernels; None for the loop."""
        if self._found is None:
            self._found = (_kernels(self._device, self._elements),)
        return self._found[0]

    @property
    def batch_elements(self) -> int:
        """How many elements are measured before they are biased."""
        if self.get() is not None:
            return _ALL
        return _CPU_BATCH if self._device.type == "cpu" else _GPU_BATCH


def _kernels(device: torch.device, elements: int) -> Kernels | None:
    wanted = os.environ.get(VARIABLE, "auto")
    one_of(VARIABLE, wanted, CHOICES, "It chooses the kernels of the injection.")
    if wanted == "loop":
        return None
    if device.type == "cuda":
        return _triton()
    if device.type == "cpu" and (wanted == "native" or elements >= _WORTH):
        return native_kernels()
    return None


def _triton() -> Kernels | None:
    """Those of Triton, which comes with torch for CUDA; None where it does not import."""
    try:
        from drift_merge.training.inject.kernels.triton_kernels import TritonKernels
    except ImportError:
        return None
    return TritonKernels()
