"""Task vectors of one chunk, and the way back to the merged weights.

Task vectors are taken with the opposite sign, nu_x = theta_b - theta_x: where a model agrees with
the base nu is +0.0, and subtracting that leaves the base as it is, a base of -0.0 included.

Shapes: n = entries of a chunk, N = merged models: the mllm first, then the reasoners.
"""

from collections.abc import Sequence
from functools import wraps

from torch import Tensor, sub

from drift_merge.maths.chunks import Chunk, MethodSettings, pieces
from drift_merge.maths.methods.table import Combine, MethodState


def negated_deltas(chunk: Chunk) -> list[Tensor]:
    """N tensors nu = theta_b - theta, written over the models of the chunk."""
    assert chunk.base is not None
    return [sub(chunk.base, model, out=model) for model in (chunk.mllm, *chunk.reasoners)]


def magnitudes(chunk: Chunk) -> list[Tensor]:
    """N tensors |tau|, written over the models of the chunk."""
    return [nu.abs_() for nu in negated_deltas(chunk)]


def restored(chunk: Chunk, merged: Tensor, settings: MethodSettings, factor: float = 1.0) -> Tensor:
    """theta_b + scale * factor * tau for a merged task vector given negated; over the base."""
    assert chunk.base is not None
    return chunk.base.add_(merged, alpha=-settings.numbers["scale"] * factor)


def all_weights(settings: MethodSettings) -> tuple[float, ...]:
    """The weights of the N merged models, the mllm's first."""
    return (settings.mllm_weight, *settings.weights)


def weighted_sum(
    taus: list[Tensor],
    settings: MethodSettings,
    *,
    normalize: bool,
    factors: Sequence[float] | None = None,
) -> Tensor:
    """sum(w_i f_i tau_i), divided by sum(w_i) if told so and that is not below 1e-8; f_i = 1."""
    weights = all_weights(settings)
    total = sum(weights) if normalize else 1.0
    total = total if abs(total) >= 1e-8 else 1.0
    shares = [w * f / total for w, f in zip(weights, factors or [1.0] * len(taus), strict=True)]
    merged = taus[0] if shares[0] == 1.0 else taus[0].mul_(shares[0])
    for tau, share in zip(taus[1:], shares[1:], strict=True):
        merged.add_(tau, alpha=share)
    return merged


def piecewise(combine: Combine) -> Combine:
    """A `combine` that works through a chunk in pieces; the one given writes over the base."""

    @wraps(combine)
    def over_pieces(chunk: Chunk, state: MethodState, settings: MethodSettings) -> Tensor:
        for piece in pieces(chunk):
            combine(piece, state, settings)
        assert chunk.base is not None
        return chunk.base

    return over_pieces
