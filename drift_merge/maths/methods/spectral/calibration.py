"""Singular value calibration of any method's merged task vector: `--calibrate svc`.

    tau_m = U S V^T,  s_r^i = <u_r^T tau_m, u_r^T tau_i> / ||u_r^T tau_i||^2
    gamma_r = N / sum_i max(alpha, s_r^i),  tau = U diag(gamma S) V^T

A direction that several models share is counted once, not once for each. A model that has nothing
in a direction (u_r^T tau_i = 0) is left out of its mean, where the paper divides by zero.

Shapes: m, n = rows and columns of a matrix, r = min(m, n), N = merged models, the mllm the first.

Source: Singular Value Calibration, arXiv:2602.05536, equations 4, 8 and algorithm 1.
"""

from collections.abc import Iterable
from functools import partial

import torch
from torch import Tensor

from drift_merge.maths.chunks import Chunk, MethodSettings, Read
from drift_merge.maths.methods.spectral.by_matrix import ByMatrix, Gather, Take, tau
from drift_merge.maths.methods.table import Combine, Method, MethodState
from drift_merge.maths.spectra.leading import full, one_thread


def is_asked(settings: MethodSettings) -> bool:
    """Whether the options of a tensor that holds matrices ask for it."""
    return settings.words.get("calibrate", "none") == "svc" and bool(settings.matrices)


def calibrated(
    read: Read, settings: MethodSettings, method: Method, state: MethodState
) -> tuple[ByMatrix, Combine]:
    """The state and the `combine` of a method on a base with its result calibrated.

    Args:
        read: of the tensor.
        settings: of it.
        method: whose result is calibrated.
        state: what that method has measured.
    """
    merged = partial(_merged, method=method, state=state, settings=settings)
    made = ByMatrix(
        read,
        settings,
        partial(_negated, merged=merged, settings=settings),
        before=state.prepare if isinstance(state, ByMatrix) else None,
    )

    def combine(chunk: Chunk, state: ByMatrix, settings: MethodSettings) -> Tensor:
        assert chunk.base is not None
        return chunk.base.sub_(state.entries(chunk))

    return made, combine


def _merged(
    chunk: Chunk, *, method: Method, state: MethodState, settings: MethodSettings
) -> Tensor:
    assert chunk.base is not None
    base = chunk.base.clone()
    return method.combine(chunk, state, settings) - base


def _negated(gather: Gather, key: int, *, merged: Take, settings: MethodSettings) -> Tensor:
    whole = gather(merged)
    found = full(whole)
    taus = (gather(tau(number)) for number in range(1 + len(settings.weights)))
    factors = _factors(found.u, whole, taus, settings.numbers["calibrate_alpha"])
    return found.product(found.values * factors).neg_().add_(0.0)


def _factors(u: Tensor, merged: Tensor, taus: Iterable[Tensor], alpha: float) -> Tensor:
    """gamma (r,)."""
    with one_thread():
        response = u.T @ merged
        sums = torch.zeros_like(response[:, 0])
        count = torch.zeros_like(sums)
        for one in taus:
            own = u.T @ one
            squared = own.square().sum(1)
            tiny = (torch.finfo(u.dtype).eps * 8) ** 2 * one.square().sum()
            has = squared > tiny
            share = (response * own).sum(1) / squared.clamp(min=torch.finfo(u.dtype).tiny)
            sums += torch.where(has, share.clamp(min=alpha), 0.0)
            count += has
        return torch.where(count > 0, count / sums.clamp(min=torch.finfo(u.dtype).tiny), 1.0)
