"""Every formula once more: naive, in float64, one element at a time, written from the papers.

Slow on purpose. `drift_merge.maths` is compared with this, within bounds that follow from the
rounding of float32 and of the output dtype; no tolerance here is a habit.
"""

from collections.abc import Sequence
from math import frexp, sqrt

import torch
from torch import Tensor

# Unit roundoff u (half the distance from 1 to the next number) and smallest subnormal.
ROUNDOFF = {
    torch.float64: 2.0**-53,
    torch.float32: 2.0**-24,
    torch.float16: 2.0**-11,
    torch.bfloat16: 2.0**-8,
}
SMALLEST = {
    torch.float64: 2.0**-1074,
    torch.float32: 2.0**-149,
    torch.float16: 2.0**-24,
    torch.bfloat16: 2.0**-133,
}
DTYPES = tuple(ROUNDOFF)


def numbers(tensor: Tensor) -> list[float]:
    """The elements of a tensor as float64, in order; exact for every dtype here."""
    return tensor.double().flatten().tolist()


def delta(reasoner: Sequence[float], mllm: Sequence[float]) -> list[float]:
    """delta = theta_reasoner - theta_mllm: the reasoning prior of DRIFT, arXiv 2510.15050, sec. 3.

    With the base in the place of the mllm it is the task vector of Ilharco et al.,
    arXiv 2212.04089, sec. 2: tau = theta_ft - theta_pre.
    """
    return [ours - theirs for ours, theirs in zip(reasoner, mllm, strict=True)]


def linear(
    mllm: Sequence[float], reasoners: Sequence[Sequence[float]], weights: Sequence[float]
) -> list[float]:
    """theta = (1 - sum w) theta_mllm + sum_i w_i theta_i.

    For one reasoner alpha theta_v + (1 - alpha) theta_r with alpha = 1 - w: "Bring Reason to
    Vision", arXiv 2505.05464, linear merging. For equal weights the soup of arXiv 2203.05482.
    """
    merged = []
    for index, own in enumerate(mllm):
        value = (1.0 - sum(weights)) * own
        for weight, reasoner in zip(weights, reasoners, strict=True):
            value += weight * reasoner[index]
        merged.append(value)
    return merged


def statistics(
    reasoner: Sequence[float], mllm: Sequence[float], difference: Sequence[float]
) -> dict[str, float | None]:
    """L2 norms, cosine of both (0 if one is zero), largest |delta|, share of equal entries."""

    def norm(values: Sequence[float]) -> float:
        return sqrt(sum(value * value for value in values))

    scale = norm(reasoner) * norm(mllm)
    product = sum(a * b for a, b in zip(reasoner, mllm, strict=True))
    return {
        "norm_delta": norm(difference),
        "norm_mllm": norm(mllm),
        "norm_reasoner": norm(reasoner),
        "cosine": product / scale if scale else 0.0,
        "max_abs_delta": max(map(abs, difference), default=0.0),
        "equal": difference.count(0.0) / len(difference) if difference else None,
    }


def half_ulp(value: float, dtype: torch.dtype) -> float:
    """The largest error of rounding `value` to nearest in `dtype`, subnormals included."""
    _, exponent = frexp(value)  # value = f * 2**exponent, 0.5 <= |f| < 1
    return max(ROUNDOFF[dtype] * 2.0 ** (exponent - 1) if value else 0.0, SMALLEST[dtype] / 2)


def compute_dtype(*dtypes: torch.dtype) -> torch.dtype:
    """What arithmetic is done in: float32, or float64 where an input is float64."""
    return torch.float64 if torch.float64 in dtypes else torch.float32


def delta_bound(exact: float, compute: torch.dtype, out: torch.dtype) -> float:
    """|computed - exact| of one subtraction of numbers that `compute` holds, then one rounding."""
    error = half_ulp(exact, compute)
    return error if out == compute else error + half_ulp(abs(exact) + error, out)


def linear_bound(
    mllm: float,
    reasoners: Sequence[float],
    weights: Sequence[float],
    compute: torch.dtype,
    out: torch.dtype,
) -> float:
    """|computed - exact| of mllm + sum_i w_i (r_i - mllm), then one rounding to `out`.

    Each term: w_i rounded to `compute`, a subtraction and a product, relative error (1 + u)**3;
    each of the n additions: u times the largest partial sum. Plus the subnormal grid, of the
    weights too.
    """
    unit = ROUNDOFF[compute]
    terms = [abs(w) * abs(r - mllm) for w, r in zip(weights, reasoners, strict=True)]
    largest = abs(mllm) + sum(terms)
    error = 1.01 * unit * (3 * sum(terms) + len(terms) * largest)
    error += 2 * SMALLEST[compute] * sum(1 + abs(w) for w in weights)
    # A weight too small for `compute` is off by its grid, and the difference may be huge.
    error += SMALLEST[compute] * sum(abs(r - mllm) for r in reasoners)
    # The float64 reference rounds too: n + 2 operations.
    error += 2.0**-53 * (len(terms) + 2) * (largest + sum(abs(w) for w in weights) * largest)
    exact = linear([mllm], [[r] for r in reasoners], weights)[0]
    return error if out == compute else error + half_ulp(abs(exact) + error, out)
