"""NuSLERP and Model Stock: angles of whole tensors, of their rows, or of their columns.

Shapes: R, C = rows of a chunk and entries of a row; N = merged models, the mllm first.
"""

from collections.abc import Sequence
from itertools import combinations
from math import fsum, pi, sqrt

import torch
from torch import Tensor

from drift_merge.maths.chunks import BLOCK, Chunk, MethodSettings, Read, blocks
from drift_merge.maths.methods.spherical import (
    LONGER,
    OPPOSITE,
    Gram,
    angle_of,
    arc,
    basis,
    combined,
    gram,
    product,
    vectors,
)


def measure_nuslerp(read: Read, settings: MethodSettings) -> list[float] | list[Tensor] | None:
    """Coefficients for the whole tensor; or per column the products; None for rows."""
    if settings.flags["flatten"]:
        products = gram(read)
        theta = None if products is None else angle_of(products, settings)
        return list(arc(_fraction(settings), theta, straight_above=1.0))
    if not _by_columns(settings):
        return None
    width = settings.row_length
    totals: list[Tensor] = []
    for block in blocks(read, max(1, BLOCK // max(width, 1)) * max(width, 1)):
        sums = _products(block, width, dim=0)
        totals = [a + b for a, b in zip(totals, sums, strict=True)] if totals else sums
    return totals


def nuslerp(
    chunk: Chunk, state: list[float] | list[Tensor] | None, settings: MethodSettings
) -> Tensor:
    """slerp from mllm to reasoner at t = w / (w_m + w); with a base, of their task vectors.

    mergekit's nuslerp (no paper): the angle is that of the whole tensors (`flatten`), else of
    each row, or with `column_wise` of each column (mergekit calls that nuslerp_row_wise); a 1-D
    tensor is one row. Where a vector is 0 the line is taken; variant `mergekit` takes an
    angle of pi / 2 there.
    """
    if settings.flags["flatten"]:
        assert state is not None
        return combined(chunk, [float(c) for c in state])
    width = settings.row_length
    if state is None:
        copy = Chunk(
            chunk.begin, chunk.cols, chunk.mllm.clone(), [chunk.reasoners[0].clone()], chunk.base
        )
        state = _products(copy, width, dim=-1)
    own, other = _arcs(_fraction(settings), [torch.as_tensor(x) for x in state], settings)
    dim = 0 if _by_columns(settings) else -1
    mllm, reasoner = chunk.mllm.view(-1, width), chunk.reasoners[0].view(-1, width)
    start = mllm if chunk.base is None else mllm - chunk.base.view(-1, width)
    # m - ((1 - c_m - c_r) v_m + c_r (m - r)): where all agree, +0.0 is subtracted.
    lack = (1.0 - own - other).to(mllm).unsqueeze(dim)
    step = (mllm - reasoner).mul_(other.to(mllm).unsqueeze(dim))
    return mllm.sub_(step.add_(start * lack)).view(-1)


def _by_columns(settings: MethodSettings) -> bool:
    """A 1-D tensor has one row and no columns: entry by entry there would be no angle at all."""
    return settings.flags["column_wise"] and len(settings.shape) > 1


def _fraction(settings: MethodSettings) -> float:
    total = settings.mllm_weight + settings.weights[0]
    return 0.5 if abs(total) < 1e-6 else settings.weights[0] / total


def _products(chunk: Chunk, width: int, dim: int) -> list[Tensor]:
    """v_0 . v_0, v_1 . v_1, v_0 . v_1, v_0 . d and d . d along rows or columns, float64.

    As in `spherical.gram`; overwrites the chunk.
    """
    first, other = (vector.view(-1, width) for vector in vectors(chunk))
    found = [(a * b).sum(dim).double() for a, b in ((other, other), (first, other))]
    first, step = (vector.view(-1, width) for vector in basis(chunk))
    pairs = ((first, first), (first, step), (step, step))
    square, *rest = [(a * b).sum(dim).double() for a, b in pairs]
    return [square, *found, *rest]


def _arcs(t: float, products: Sequence[Tensor], settings: MethodSettings) -> tuple[Tensor, Tensor]:
    """`spherical.arc` of many angles at once."""
    one, other, (direct, along, step) = products[0].sqrt(), products[1].sqrt(), products[2:]
    gap = (2.0 * along + step) / (one + other)
    square = (step - gap * gap) / (one * other)
    is_long = torch.maximum(one, other) > LONGER * torch.minimum(one, other)
    square = torch.where(is_long, 2.0 - 2.0 * direct / (one * other), square)
    chord = square.clamp_(min=0.0).sqrt_()
    theta = 2.0 * (chord / 2.0).clamp_(max=1.0).asin_()
    if settings.variant == "mergekit":
        theta = torch.where((one * other == 0.0) & (one + other > 0.0), pi / 2.0, theta)
    # NaN, the angle with a zero vector, is a line too.
    curved = (theta > 0.0) & (theta < OPPOSITE)
    safe = torch.where(curved, theta, 1.0)
    first, second = ((1.0 - t) * safe).sin() / safe.sin(), (t * safe).sin() / safe.sin()
    return torch.where(curved, first, 1.0 - t), torch.where(curved, second, t)


def measure_model_stock(read: Read, settings: MethodSettings) -> list[float] | None:
    """The coefficient of every model; None for `filter_wise`, which looks at rows."""
    if settings.flags["filter_wise"]:
        return None
    count = 1 + len(settings.weights)
    products = gram(read)
    if products is None:
        return [1.0 / count] * count
    cosines = [_cosine(products, i, j, settings) for i, j in combinations(range(count), 2)]
    ratio = float(_ratio(torch.tensor(fsum(cosines) / len(cosines)).double(), count, settings))
    return [ratio / count] * count


def model_stock(chunk: Chunk, state: list[float] | None, settings: MethodSettings) -> Tensor:
    """theta = t * mean(theta_i) + (1 - t) * theta_b, t = N cos / (1 + (N - 1) cos).

    cos is the mean cosine between the task vectors of two models. Model Stock, arXiv 2403.19522,
    section 4 (the ratio for N models). t is per tensor, or with `filter_wise` per row. Weights
    play no part. In `paper` t is clamped to [0, 1], outside of which the estimate extrapolates
    and the paper's geometry does not hold; `mergekit` does not clamp, and counts the product of
    two norms as at least 1e-6.
    """
    if state is not None:
        return combined(chunk, state)
    assert chunk.base is not None
    base, width = chunk.base, settings.row_length
    count = 1 + len(settings.weights)
    taus = [t.sub_(base).view(-1, width) for t in (chunk.mllm, *chunk.reasoners)]
    norms = [(tau * tau).sum(-1).double().sqrt_() for tau in taus]
    floor = 1e-6 if settings.variant == "mergekit" else 1e-300
    cosines = [
        (taus[i] * taus[j]).sum(-1).double() / (norms[i] * norms[j]).clamp_(min=floor)
        for i, j in combinations(range(count), 2)
    ]
    mean = torch.stack([cosine.clamp_(-1.0, 1.0) for cosine in cosines]).mean(0)
    ratio = _ratio(mean, count, settings).div_(count).to(base).unsqueeze(-1)
    total = taus[0]
    for tau in taus[1:]:
        total.add_(tau)
    # Subtracted from 0.0, so that where no model moved, what is added leaves the base as it is.
    return base.sub_(total.mul_(ratio).view(-1).neg_())


def _cosine(products: Gram, i: int, j: int, settings: MethodSettings) -> float:
    norms = sqrt(max(product(products, i, i), 0.0)) * sqrt(max(product(products, j, j), 0.0))
    if settings.variant == "mergekit":
        norms = max(norms, 1e-6)
    return max(-1.0, min(1.0, product(products, i, j) / norms)) if norms else 0.0


def _ratio(cosine: Tensor, count: int, settings: MethodSettings) -> Tensor:
    """t from the mean cosine; 0 where the formula has no value."""
    below = 1.0 + (count - 1) * cosine
    singular = below.abs() < 1e-6
    ratio = count * cosine / torch.where(singular, 1.0, below)
    ratio = torch.where(singular, 0.0, ratio)
    return ratio.clamp(0.0, 1.0) if settings.variant == "paper" else ratio
