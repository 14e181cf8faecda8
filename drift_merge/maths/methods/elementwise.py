"""Methods that need no look at the whole tensor: linear combinations and their near kin.

theta_b: base, theta_m: mllm, theta_i: reasoners, tau_x = theta_x - theta_b, w: weights.
Shapes: every chunk is one-dimensional, all of equal length.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, sub

from drift_merge.maths.chunks import Chunk, MethodSettings
from drift_merge.maths.methods.table import MethodState
from drift_merge.maths.methods.taus import all_weights, negated_deltas, piecewise, restored


def interpolate(mllm: Tensor, reasoners: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """theta = (1 - sum(w)) * mllm + sum(w_i * reasoner_i), over the chunk `mllm`.

    Computed as mllm - sum(w_i * (mllm - reasoner_i)), the same value, so that equal inputs
    give exactly that input, down to the sign of zero. Overwrites its inputs.

    Args:
        mllm: the chunk of the multimodal model.
        reasoners: one chunk per reasoner.
        weights: w_i, one per reasoner, any finite number but 0; [0, 1] interpolates.

    Returns:
        The merged chunk, in one of the inputs' memory.

    Source: model soups, arXiv 2203.05482, eq. 1; for language towers with w = 0.1, "Bring
    Reason to Vision", arXiv 2505.05464.
    """
    if list(weights) == [1.0]:
        return reasoners[0]  # m - (m - r) would round; weight 1 is the reasoner, bit for bit
    # Where models agree the difference is +0.0, and -0.0 + 0.0 would be +0.0: the order of each
    # difference is chosen so that what is added to the mllm there is -0.0, which changes nothing.
    differences = [
        sub(mllm, reasoner, out=reasoner) if weight > 0 else reasoner.sub_(mllm)
        for reasoner, weight in zip(reasoners, weights, strict=True)
    ]
    for difference, weight in zip(differences, weights, strict=True):
        mllm.add_(difference, alpha=-abs(weight))
    return mllm


def combination(
    mllm: Tensor, others: Sequence[Tensor], mllm_weight: float, weights: Sequence[float]
) -> Tensor:
    """theta = c_m * theta_m + sum(c_i * theta_i), any coefficients; overwrites its inputs.

    Coefficients that sum to exactly 1 go through `interpolate`, so that equal inputs give that
    input and (1, 0, ...) the mllm, bit for bit. A model whose coefficient is 1 among zeros is
    returned as it is.
    """
    used = [(t, w) for t, w in zip(others, weights, strict=True) if w != 0.0]
    if mllm_weight == 0.0 and len(used) == 1:
        return _scaled(used[0][0], used[0][1])
    total = mllm_weight + sum(w for _, w in used)
    if abs(total - 1.0) <= 1e-12:
        return interpolate(mllm, [t for t, _ in used], [w for _, w in used])
    # The differences first: what the models share is scaled once, what differs is small. Their
    # order is that of `interpolate`.
    differences = [
        sub(mllm, other, out=other) if weight > 0 else other.sub_(mllm) for other, weight in used
    ]
    mllm = _scaled(mllm, total)
    for difference, (_, weight) in zip(differences, used, strict=True):
        mllm.add_(difference, alpha=-abs(weight))
    return mllm


def linear(chunk: Chunk, state: MethodState, settings: MethodSettings) -> Tensor:
    """theta = (1 - sum w) * theta_m + sum(w_i * theta_i).

    Model soups, arXiv 2203.05482, section 2 (the uniform soup is w = 1 / N); for language towers
    "Bring Reason to Vision", arXiv 2505.05464, with w = 0.1.

    Variant `mergekit`: the mllm has a weight of its own, and with `normalize` all weights are
    divided by their sum: theta = (w_m theta_m + sum w_i theta_i) / (w_m + sum w_i).
    """
    if settings.variant == "paper":
        return combination(
            chunk.mllm, chunk.reasoners, 1.0 - sum(settings.weights), settings.weights
        )
    own, weights = settings.mllm_weight, settings.weights
    if settings.flags["normalize"]:
        total = own + sum(weights)
        own, weights = own / total, tuple(w / total for w in weights)
    return combination(chunk.mllm, chunk.reasoners, own, weights)


def task_arithmetic(chunk: Chunk, state: MethodState, settings: MethodSettings) -> Tensor:
    """theta = theta_b + scale * (w_m tau_m + sum(w_i tau_i)).

    Task arithmetic, arXiv 2212.04089, section 2 (task addition: tau_new = sum of tau_i, then
    theta_new = theta_b + lambda * tau_new). With w_m = scale = 1 it is theta_m + sum(w_i tau_i).

    Variant `mergekit`: with `normalize` the sum is divided by the sum of all weights, unless
    that is below 1e-8.
    """
    assert chunk.base is not None
    scale = settings.numbers["scale"]
    if settings.flags["normalize"]:
        total = settings.mllm_weight + sum(settings.weights)
        scale /= total if abs(total) >= 1e-8 else 1.0
    weights = tuple(scale * w for w in settings.weights)
    return add_deltas(
        chunk.mllm, chunk.reasoners, chunk.base, scale * settings.mllm_weight, weights
    )


def add_deltas(
    mllm: Tensor,
    reasoners: Sequence[Tensor],
    base: Tensor,
    mllm_weight: float,
    weights: Sequence[float],
) -> Tensor:
    """theta_b + c_m tau_m + sum(c_i tau_i), any coefficients; overwrites its inputs."""
    used = [(t, w) for t, w in zip(reasoners, weights, strict=True) if w != 0.0]
    if mllm_weight == 0.0 and [w for _, w in used] == [1.0]:
        return used[0][0]  # base + (r - base) would round
    start = base
    if mllm_weight == 1.0:
        start = mllm  # base + (mllm - base) would round
    elif mllm_weight != 0.0:
        used = [(mllm, mllm_weight), *used]
    # As in `interpolate`: where models agree, -0.0 is added, which leaves the sign of zero alone.
    differences = [
        (sub(base, t, out=t) if weight > 0 else t.sub_(base), weight) for t, weight in used
    ]
    for difference, weight in differences:
        start.add_(difference, alpha=-abs(weight))
    return start


def inject(chunk: Chunk, state: MethodState, settings: MethodSettings) -> Tensor:
    """theta = theta_m + scale * sum(w_i delta_i), delta_i = theta_i - theta_m (DRIFT's prior).

    DRIFT, arXiv 2510.15050, section 3, for the prior; the same as linear with w = scale * w_i.
    With a base delta_i = theta_i - theta_b, and this is the chat vector. With the flag
    `is_delta` the reasoners are such deltas already, as a prior on disk holds them.
    """
    weights = tuple(settings.numbers["scale"] * w for w in settings.weights)
    if settings.flags["is_delta"]:
        for delta, weight in zip(chunk.reasoners, weights, strict=True):
            if weight != 0.0:
                chunk.mllm.add_(delta, alpha=weight)
        return chunk.mllm
    if chunk.base is None:
        return combination(chunk.mllm, chunk.reasoners, 1.0 - sum(weights), weights)
    return add_deltas(chunk.mllm, chunk.reasoners, chunk.base, 1.0, weights)


def chat_vector(chunk: Chunk, state: MethodState, settings: MethodSettings) -> Tensor:
    """theta = theta_m + scale * sum(w_i * (theta_i - theta_b)).

    Chat Vector, arXiv 2310.04799, section 3 (scale = 1 there).
    """
    assert chunk.base is not None
    weights = tuple(settings.numbers["scale"] * w for w in settings.weights)
    return add_deltas(chunk.mllm, chunk.reasoners, chunk.base, 1.0, weights)


def passthrough(chunk: Chunk, state: MethodState, settings: MethodSettings) -> Tensor:
    """theta = scale * theta_1: the reasoner's tensor takes the place of the mllm's."""
    return _scaled(chunk.reasoners[0], settings.numbers["scale"])


def nearswap(chunk: Chunk, state: MethodState, settings: MethodSettings) -> Tensor:
    """theta = theta_m + a * (theta_1 - theta_m), a = min(1, t / |theta_1 - theta_m|).

    So each entry moves towards the reasoner by at most t: nearswap of alchemonaut's QuartetAnemoi
    models (no paper). mergekit bounds |difference| below by 1e-6 in the division, which differs
    for t < 1e-6 only; variant `mergekit` does so.
    """
    # mllm - reasoner, and subtracted: where they agree +0.0 is subtracted, which changes nothing.
    t, step = settings.numbers["t"], sub(chunk.mllm, chunk.reasoners[0])
    if settings.variant == "mergekit" and t < 1e-6:
        fraction = step.abs().clamp_(min=1e-6).reciprocal_().mul_(t).clamp_(0.0, 1.0)
        return chunk.mllm.sub_(step.mul_(fraction))
    return chunk.mllm.sub_(step.clamp_(-t, t))


@piecewise
def consensus_ta(chunk: Chunk, state: MethodState, settings: MethodSettings) -> Tensor:
    """theta = theta_b + scale * m * tau, tau = sum(w_i tau_i) over all models, m in {0, 1}.

    An entry is kept where at least `agreement` models find it important for themselves:
    m = [sum_i [|w_i tau_i| >= mask_lambda * |tau - w_i tau_i|] >= agreement].

    TALL masks and Consensus TA, arXiv 2405.07813, section 4 (masks) and section 5 (consensus).
    """
    taus = negated_deltas(chunk)
    for tau, weight in zip(taus, all_weights(settings), strict=True):
        _scaled(tau, weight)
    total = taus[0].clone()
    for tau in taus[1:]:
        total.add_(tau)
    votes, rest = torch.zeros_like(total), torch.empty_like(total)
    for tau in taus:
        torch.sub(total, tau, out=rest).abs_().mul_(settings.numbers["mask_lambda"])
        votes.add_(torch.ge(tau.abs_(), rest, out=rest))
    return restored(chunk, total.mul_(votes.ge_(settings.numbers["agreement"])), settings)


def _scaled(tensor: Tensor, factor: float) -> Tensor:
    return tensor if factor == 1.0 else tensor.mul_(factor)
