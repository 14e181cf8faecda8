"""How far tensors of singular directions, made again, lie from those on the disk.

Another processor or BLAS rounds otherwise, and their bytes are those of one machine: where they
differ, what counts is the distance of the two.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from math import sqrt
from pathlib import Path

import torch

from drift_merge.engine.reread import read_shards
from drift_merge.engine.storing.compressing import Sink
from drift_merge.errors import VerificationError
from drift_merge.maths.dtypes import TORCH_DTYPES
from drift_merge.plans.plan import Step, place_of
from drift_merge.storage.headers import TensorInfo
from drift_merge.storage.measured import TensorRecord

Stored = tuple[Path, TensorInfo]


class Distance(Sink, ABC):
    """Takes the bytes of what is made again, and says how far it is from what is stored."""

    @abstractmethod
    def measure(self, found: TensorRecord) -> tuple[float, float]:
        """The L2 norm of the difference, and that of what it is compared with."""


class _OfTensor(Distance):
    """A tensor of a merge."""

    def __init__(self, stored: Stored) -> None:
        self._stored, self._squared = stored, 0.0

    def write(self, info: TensorInfo, begin: int, data: memoryview) -> None:
        made, old = _values(info, bytearray(data)), _read(self._stored, begin, len(data))
        self._squared += float((made - old).square_().sum())

    def measure(self, found: TensorRecord) -> tuple[float, float]:
        return sqrt(self._squared), found.get("norm_made") or 0.0


class _OfFactors(Distance):
    """The factors of a delta of low rank: their products are compared, never made.

    Singular vectors have no sign, and those of equal singular values no direction of their own.
    """

    def __init__(self, step: Step, stored: Mapping[str, Stored]) -> None:
        self._step, self._stored = step, stored
        self._made = {name: bytearray(info.size_bytes) for name, (_, info) in stored.items()}

    def write(self, info: TensorInfo, begin: int, data: memoryview) -> None:
        self._made[info.name][begin : begin + len(data)] = data

    def measure(self, found: TensorRecord) -> tuple[float, float]:
        names = [name for name, _, _ in self._step.stored]
        infos = [self._stored[name][1] for name in names]
        u, v = (_values(i, self._made[i.name]).view(i.shape) for i in infos)
        x, y = (_read(self._stored[i.name], 0, i.size_bytes).view(i.shape) for i in infos)
        squared = norm = 0.0
        row, col = 0, 0
        for place in map(place_of, self._step.matrices):
            rows, cols = slice(row, row + place.height), slice(col, col + place.width)
            made = torch.cat([u[rows], x[rows]], 1), torch.cat([v[cols], -y[cols]], 1)
            # |U V^T - X Y^T|^2 by the small products, in float64
            squared += float(((made[0].T @ made[0]) * (made[1].T @ made[1])).sum())
            norm += float(((x[rows].T @ x[rows]) * (y[cols].T @ y[cols])).sum())
            row, col = rows.stop, cols.stop
        return sqrt(max(0.0, squared)), sqrt(max(0.0, norm))


def distances(
    directory: Path | None, chosen: Sequence[Step], tensors: Mapping[str, TensorRecord]
) -> dict[str, Distance]:
    """For each tensor that was made by singular directions.

    Args:
        directory: of the artifact; None: nothing is compared but bytes.
        chosen: steps that are made again.
        tensors: the manifest's table.
    """
    wanted = [step for step in chosen if step.rank or "matrices" in tensors[step.name]]
    if directory is None or not wanted:
        return {}
    headers = read_shards(directory, sorted(p.name for p in directory.glob("*.safetensors")))
    infos = [info for header in headers.values() for info in header.tensors.values()]
    stored = {info.name: (directory / info.shard, info) for info in infos}
    found: dict[str, Distance] = {}
    for step in wanted:
        names = [name for name, _, _ in step.stored]
        if step.rank and all(name in stored for name in names):
            found[step.name] = _OfFactors(step, {name: stored[name] for name in names})
        elif not step.rank:
            found[step.name] = _OfTensor(stored[step.name])
    return found


def require_near(step: Step, distance: Distance, found: TensorRecord, tolerance: float) -> None:
    """Refuse a tensor that is made again farther away than another processor explains.

    Args:
        step: of the tensor.
        distance: that has taken what was made.
        found: what was measured of it.
        tolerance: share of what singular directions hold, in [0, 1].

    Raises:
        VerificationError: naming it.
    """
    off, norm = distance.measure(found)
    if off <= tolerance * norm:
        return
    raise VerificationError(
        f"{step.name} computed again is off by {off:.3g}, more than {tolerance:.0%} of what "
        f"its singular directions hold ({norm:.3g}).",
        remedy="Make it again; if it differs again, report it with both manifests.",
    )


def _values(info: TensorInfo, data: bytearray) -> torch.Tensor:
    return torch.frombuffer(data, dtype=TORCH_DTYPES[info.dtype]).double()


def _read(stored: Stored, begin: int, size: int) -> torch.Tensor:
    path, info = stored
    with open(path, "rb") as file:
        file.seek(info.start + begin)
        return _values(info, bytearray(file.read(size)))
