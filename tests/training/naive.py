"""The biased gradient once more: naive, float64, on whole tensors, from the paper's formulas."""

from math import sqrt

import torch
from torch import Tensor

RULES = ("absolute", "absolute_param_norm", "gradnorm", "adaptive_cosine", "sign", "anchor")


def biased(
    rule: str, gradient: Tensor, delta: Tensor, *, alpha: float = 1.0, mllm_norm: float = 0.0
) -> Tensor:
    """g' of one tensor.

    Args:
        rule: one of `RULES`.
        gradient: any shape and dtype.
        delta: the same shape; for `anchor` what is left of it, theta_reasoner - theta.
        alpha: strength.
        mllm_norm: |theta_mllm|, for `absolute_param_norm`.
    """
    g, d = gradient.double(), delta.double()
    if rule in ("absolute", "anchor"):
        return g - alpha * d
    if rule == "sign":
        d = torch.where(g * d < 0, d, 0.0)
    norm_g, norm_d = sqrt(float((g * g).sum())), sqrt(float((d * d).sum()))
    if norm_d == 0.0:
        return g
    if rule == "absolute_param_norm":
        return g - alpha * mllm_norm * d / norm_d
    strength = norm_g
    if rule == "adaptive_cosine":
        cosine = float((g * d).sum()) / (norm_g * norm_d) if norm_g else 0.0
        strength *= (1.0 + cosine) / 2.0
    return g - alpha * strength * d / norm_d


def tolerance(gradient: Tensor, expected: Tensor) -> float:
    """What rounding may cost: a few steps of the dtype at the largest value in play."""
    eps = max(torch.finfo(gradient.dtype).eps, torch.finfo(torch.float32).eps)
    if gradient.dtype == torch.float64:
        eps = torch.finfo(torch.float64).eps * 64
    largest = max(float(gradient.double().abs().max()), float(expected.abs().max()), 1e-30)
    return 8 * eps * largest
