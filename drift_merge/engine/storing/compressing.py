"""Writes one tensor of a compressed prior: rounds, compresses and measures it chunk by chunk."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from drift_merge.engine.workspace import Workspace
from drift_merge.maths.compression import StoredSums, compress_rows, decompress_rows
from drift_merge.maths.dtypes import TORCH_DTYPES
from drift_merge.maths.measures import count_nonfinite
from drift_merge.plans.plan import Step
from drift_merge.storage.fingerprints import Fingerprint
from drift_merge.storage.headers import TensorInfo
from drift_merge.storage.measured import TensorRecord


class Sink(Protocol):
    """Where the bytes of an output go."""

    def write(self, info: TensorInfo, begin: int, data: Any) -> None:
        """Put bytes at [begin, begin + len) of the data of a tensor."""


def through(step: Step, result: Tensor) -> Tensor:
    """Delta in float32, as the prior that is compressed holds it."""
    if step.through:
        result = result.to(TORCH_DTYPES[step.through])
    return result.to(torch.float32)


@dataclass(slots=True)
class Compressing:
    """One tensor of a compressed prior that is being written."""

    step: Step
    infos: Mapping[str, TensorInfo]  # of the output, by name
    writer: Sink
    codes: Fingerprint
    scales: Fingerprint = field(default_factory=Fingerprint)
    sums: StoredSums = field(default_factory=StoredSums)

    def write(self, workspace: Workspace, result: Tensor, begin: int) -> bool:
        """Compress whole rows, and write codes and scales.

        Args:
            workspace: of this worker.
            result: flat, float32.
            begin: its first element in the flat tensor.

        Returns:
            Whether all of it was finite.
        """
        cols = self.step.shape[-1]
        codes, scales = compress_rows(result.view(-1, cols), TORCH_DTYPES[self.step.dtype])
        _, data = workspace.store(codes.view(-1), codes.dtype)
        self.codes.update(data)
        self.writer.write(self.infos[self.step.name], begin, data)
        found, data = workspace.store(scales, scales.dtype)
        self.scales.update(data)
        first = begin // cols * scales.dtype.itemsize
        self.writer.write(self.infos[self.step.scale], first, data)
        is_finite = count_nonfinite(found) == 0  # the scale of a row with NaN or Inf is such, too
        self.sums.add(result, decompress_rows(codes, scales).view(-1))
        return is_finite

    def add_plain(self, result: Tensor, out: Tensor) -> None:
        """Measure a chunk that is stored as it is: `out`, on the host, yet to be written."""
        self.sums.add(result, out.to(result.device, torch.float32, copy=True))

    def summary(self) -> TensorRecord:
        """What is recorded of the tensor: what its stored form keeps, and its scales."""
        kept = self.sums.summary()
        stored = TensorRecord(norm_stored=kept["norm_stored"], cosine_stored=kept["cosine_stored"])
        return {"fingerprint_scale": self.scales.text(), **stored} if self.step.scale else stored
