"""Writes one tensor of a low-rank prior: collects its matrices, factors and measures each."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import isfinite, sqrt

import torch
from torch import Tensor

from drift_merge.engine.storing.compressing import Sink
from drift_merge.engine.workspace import Workspace
from drift_merge.maths.differences import cosine_of
from drift_merge.maths.dtypes import TORCH_DTYPES
from drift_merge.maths.measures import count_nonfinite
from drift_merge.maths.spectra.leading import leading
from drift_merge.maths.spectra.matrices import Matrix, groups
from drift_merge.maths.spectra.norms import frobenius, matching_factor
from drift_merge.names.tensors import matrix_shape
from drift_merge.plans.plan import Step
from drift_merge.storage import fingerprints
from drift_merge.storage.fingerprints import Fingerprint
from drift_merge.storage.forms.factored import U_SUFFIX, V_SUFFIX
from drift_merge.storage.headers import TensorInfo
from drift_merge.storage.measured import TensorRecord


@dataclass(slots=True)
class Factoring:
    """One tensor of a low-rank prior that is being written.

    Memory: one group of matrices that share rows (nearly always one matrix), in float32.
    """

    step: Step
    infos: Mapping[str, TensorInfo]  # of the output, by name
    writer: Sink
    norm: str  # which norm of delta the factors take on
    u: Fingerprint
    v: Fingerprint = field(default_factory=Fingerprint)
    _groups: list[tuple[Matrix, ...]] = field(default_factory=list)
    _buffer: Tensor | None = None  # rows of the first group
    _num_written: int = 0  # matrices
    _rows_u: int = 0
    _rows_v: int = 0
    _is_finite: bool = True
    _exact: float = 0.0  # sums of squares: of delta, of its leading directions, of what is stored
    _kept: float = 0.0
    _stored: float = 0.0
    _error: float = 0.0  # of stored - delta

    def __post_init__(self) -> None:
        self._groups = list(groups(self.step.matrices))

    def write(self, workspace: Workspace, result: Tensor, begin: int) -> bool:
        """Take whole rows; factor and write every matrix that is complete with them.

        Args:
            workspace: of this worker.
            result: flat, float32.
            begin: its first element in the flat tensor.

        Returns:
            Whether these rows are finite; a tensor that is not is never factored.
        """
        cols = matrix_shape(self.step.shape)[1]
        is_finite = count_nonfinite(result) == 0
        self._is_finite = self._is_finite and is_finite
        rows, row = result.view(-1, cols), begin // cols
        while len(rows):
            first, end = _span(self._groups[0])
            if self._buffer is None:
                self._buffer = rows.new_empty(end - first, cols)
            taken = min(len(rows), end - row)
            self._buffer[row - first : row - first + taken] = rows[:taken]
            rows, row = rows[taken:], row + taken
            if row == end:
                self._finish(workspace, self._buffer, first)
                self._buffer = None if len(self._groups) == 1 else self._reused()
                del self._groups[0]
        return is_finite

    def _reused(self) -> Tensor | None:
        """The buffer for the next group, where that is as large."""
        assert self._buffer is not None
        first, end = _span(self._groups[1])
        return self._buffer if end - first == len(self._buffer) else None

    def _finish(self, workspace: Workspace, buffer: Tensor, first: int) -> None:
        for matrix in self._groups[0] if self._is_finite else ():
            rows = [buffer[a - first : b - first, slice(*matrix.cols)] for a, b in matrix.rows]
            self._factor(workspace, torch.cat(rows) if len(rows) > 1 else rows[0].contiguous())

    def _factor(self, workspace: Workspace, matrix: Tensor) -> None:
        """Factor a matrix (m, n), and write its rows of U and V."""
        rank, short = self.step.rank, min(matrix.shape)
        key = fingerprints.key_of("factors", self.step.canonical, self._num_written)
        found = leading(matrix, min(rank, short), key)
        factor = 1.0
        if rank < short:
            factor = matching_factor(matrix, found.values, self.norm)
        roots = (found.values * factor).sqrt()
        dtype = TORCH_DTYPES[self.step.dtype]
        u, v = (_padded(f * roots, rank).to(dtype) for f in (found.u, found.v))
        self._measure(matrix, found.values, u.float(), v.float())
        self._rows_u = self._put(workspace, U_SUFFIX, u, self._rows_u, self.u)
        self._rows_v = self._put(workspace, V_SUFFIX, v, self._rows_v, self.v)
        self._num_written += 1

    def _put(
        self, workspace: Workspace, suffix: str, values: Tensor, row: int, written: Fingerprint
    ) -> int:
        _, data = workspace.store(values.reshape(-1), values.dtype)
        written.update(data)
        offset = row * values.shape[1] * values.dtype.itemsize
        self.writer.write(self.infos[self.step.name + suffix], offset, data)
        return row + len(values)

    def _measure(self, matrix: Tensor, values: Tensor, u: Tensor, v: Tensor) -> None:
        squared, wide = frobenius(matrix) ** 2, (u.double(), v.double())
        stored = float(((wide[0].T @ wide[0]) * (wide[1].T @ wide[1])).sum())
        product = float(((matrix @ v).double() * wide[0]).sum())
        self._exact += squared
        self._kept += float(values.double().square().sum())
        self._stored += stored
        self._error += max(0.0, squared - 2.0 * product + stored)

    def summary(self) -> TensorRecord:
        """What is recorded of the tensor: V's fingerprint, and what the factors keep."""
        found = TensorRecord(fingerprint_v=self.v.text(), norm_stored=None, cosine_stored=None)
        if not self._is_finite or not isfinite(self._exact + self._stored):
            return found
        exact, stored = sqrt(self._exact), sqrt(self._stored)
        found["norm_stored"] = stored
        found["energy"] = min(1.0, self._kept / self._exact) if exact else 1.0
        if exact:
            cosine = cosine_of(exact, stored, self._error) if stored else 0.0
            found["cosine_stored"] = min(1.0, max(-1.0, cosine))
        return found


def _span(group: tuple[Matrix, ...]) -> tuple[int, int]:
    return min(m.span[0] for m in group), max(m.span[1] for m in group)


def _padded(factor: Tensor, rank: int) -> Tensor:
    """(rows, rank): the factor with columns of zeros, where it has fewer."""
    missing = rank - factor.shape[1]
    return torch.nn.functional.pad(factor, (0, missing)) if missing else factor
