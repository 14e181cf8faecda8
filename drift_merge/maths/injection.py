"""Rules: how strongly a tensor's delta enters its gradient.

    g' = g - alpha * coefficient * delta          delta = theta_reasoner - theta_mllm

The sign is the point: descent subtracts g', so the weights move along +delta, TOWARDS the
reasoner. A rule is a pure function of a few sums of each tensor, so that a rank which holds
only a slice of a tensor needs nothing but its share of these sums.

Two rules use another delta at each step (`training.options.RULE_TRAITS` says which), and the sums
are of that: `sign` of the entries that the gradient does not oppose, `anchor` of what is left of
the way, theta_reasoner - theta_t.

Source: DRIFT, arXiv 2510.15050, section 3, unless a rule says another. Shapes: P = tensors.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, ones_like

from drift_merge.errors import RecipeError

INJECTION_FORMULA = "g' = g - alpha * coefficient * delta"
INJECTION_SIGN = "descent along g' moves the weights along +delta, towards the reasoner"


@dataclass(frozen=True, slots=True)
class Sums:
    """What a rule may know of P whole tensors, all ranks together; loss scale taken out.

    delta is the rule's: all of it, or what it uses of it at this step.
    """

    grad_sq: Tensor  # shape (P,): sum of g**2
    dot: Tensor  # shape (P,): sum of g * delta
    delta_norm: Tensor  # shape (P,): |delta|, of the values that are added
    mllm_norm: Tensor  # shape (P,): |theta_mllm|, as the prior recorded it


Rule = Callable[[Sums], Tensor]  # -> coefficient for alpha = 1, shape (P,)


def absolute(sums: Sums) -> Tensor:
    """The paper's `absolute`: g - alpha * delta.

    Not homogeneous in g: its strength depends on the scale of the loss.
    """
    return ones_like(sums.grad_sq)


def absolute_param_norm(sums: Sums) -> Tensor:
    """The reference code's `absolute`: g - alpha * delta * |theta_mllm| / |delta|."""
    return _ratio(sums.mllm_norm, sums.delta_norm)


def gradnorm(sums: Sums) -> Tensor:
    """g - alpha * |g| * delta / |delta|."""
    return _ratio(sums.grad_sq.sqrt(), sums.delta_norm)


def adaptive_cosine(sums: Sums) -> Tensor:
    """The paper's DRIFT: g - alpha * (1 + cos(g, delta)) / 2 * |g| * delta / |delta|.

    At cos = +1 and alpha = 1 nothing of g is left; at cos = -1 g stays as it is.
    """
    # (1 + cos) * |g| = |g| + dot / |delta|: no division by |g|. Rounding may leave it below 0.
    twice = sums.grad_sq.sqrt() + _ratio(sums.dot, sums.delta_norm)
    return _ratio(twice.clamp(min=0.0) / 2, sums.delta_norm)


def sign(sums: Sums) -> Tensor:
    """g - alpha * |g| * (m * delta) / |m * delta|, with m = [g * delta < 0] for each entry.

    The sums are of m * delta: entries along which descent by g alone moves with delta. So to
    first order the bias lowers the loss.

    Source: GradFix, arXiv 2510.09658 (there of one sum of weights; here at each step, with the
    norm of the gradient as in `gradnorm`).
    """
    return gradnorm(sums)


def anchor(sums: Sums) -> Tensor:
    """g - alpha * (theta_reasoner - theta_t): the pull shrinks as the weights arrive.

    The gradient of alpha / 2 * |theta - theta_reasoner|**2 added to the loss.

    Source: L2-SP, Li et al. 2018, arXiv 1802.01483, with the reasoner as what is held on to.
    """
    return absolute(sums)


RULES: dict[str, Rule] = {
    "absolute": absolute,  # g - alpha * delta
    "absolute_param_norm": absolute_param_norm,  # g - alpha * delta * |theta_mllm|/|delta|
    "gradnorm": gradnorm,  # g - alpha * |g| * delta/|delta|
    "adaptive_cosine": adaptive_cosine,  # g - alpha * (1 + cos)/2 * |g| * delta/|delta|
    "sign": sign,  # g - alpha * |g| * m*delta/|m*delta|, m = [g*delta < 0]
    "anchor": anchor,  # g - alpha * (theta_reasoner - theta_t)
}


def rule_named(rule: str | Rule) -> tuple[str, Rule]:
    """Return the name and the function of a rule.

    Args:
        rule: a key of `RULES`, or a function from `Sums` to coefficients of shape (P,).

    Raises:
        RecipeError: the name is not known.
    """
    if callable(rule):
        return getattr(rule, "__name__", type(rule).__name__), rule
    if rule not in RULES:
        raise RecipeError(
            f"rule is {rule!r}; expected one of {', '.join(RULES)}, or a function.",
            remedy="A function gets drift_merge.maths.injection.Sums and returns one coefficient"
            " for each tensor.",
        )
    return rule, RULES[rule]


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """numerator / denominator, and 0 where the denominator is 0."""
    return numerator / denominator.masked_fill(denominator == 0, float("inf"))
