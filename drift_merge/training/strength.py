"""How strong a prior is against the data, and how far a step of Adam is expected to travel.

A step of Adam is about the learning rate for each entry, whatever the gradient. With a bias of
ratio r = |bias| / |g| beside a gradient that is noise along delta, an entry moves by about
lr * r / sqrt(1 + r**2) * delta / rms(delta), so that a tensor of n entries comes

    lr * r / sqrt(1 + r**2) / rms(delta)

of its way at each step: lr * 0.45 / rms(delta) at r = 1/2, that of adaptive_cosine at alpha = 1.
"""

import warnings
from collections.abc import Sequence
from math import isfinite, sqrt
from typing import Any

import torch
from torch import Tensor

from drift_merge.training.gradient_bias import GradientBias
from drift_merge.training.gradients.rounding import LIKE_ADAM
from drift_merge.training.inject.injector import Injector
from drift_merge.training.inject.pieces import DELTA_SQ, GRAD_SQ
from drift_merge.training.match.matching import Matching
from drift_merge.training.options import OWN_RULE, RULE_TRAITS
from drift_merge.training.settings import InjectionSettings

TOO_STRONG = 10.0  # bias / gradient: under Adam the data then steer next to nothing


class Strength:
    """Of one handle."""

    def __init__(
        self,
        settings: InjectionSettings,
        matching: Matching,
        bias: GradientBias,
        steppers: Sequence[Any],
    ) -> None:
        self._bias, self._steppers = bias, tuple(steppers)
        self._is_adapted = bool(matching.adapted)  # whose factors move the weights otherwise
        self._nominal = RULE_TRAITS.get(settings.rule, OWN_RULE).nominal
        self._steps, self._next, self._is_warned = 0, 1, False

    def look(self) -> None:
        """Warn once of a bias that is many times the gradient; called after every biased step.

        Looks after steps 1, 2, 4, 8, ...: the sums are on the device, and to look waits for it.
        """
        self._steps += 1
        if self._is_warned or self._steps < self._next:
            return
        self._next = 2 * self._steps
        ratio = bias_ratio(self._bias.injectors)
        if ratio is not None and ratio > TOO_STRONG:
            self._is_warned = True
            alphas = (abs(a) for injector in self._bias.injectors for a in injector.slots.alphas)
            _warn(ratio, max(alphas), self._steps)

    def expected(self) -> float | None:
        """The share of the way that a step is expected to travel, over all tensors.

        Waits for the device. By the bias of the last step; before the first one by the rule's.

        Returns:
            None where it is not known: no Adam, adapters, or no step yet and a rule whose
            strength depends on the gradient.
        """
        rate = None if self._is_adapted else adam_rate(self._steppers)
        if rate is None or not self._bias.is_ready:
            return None
        way = aim = 0.0
        for injector, units in zip(self._bias.injectors, self._bias.unit_groups, strict=True):
            share = _share(injector, self._nominal)
            if share is None:
                return None
            sizes = dict.fromkeys(injector.slots.names, 0)
            for unit in units:
                sizes[unit.name] += unit.numel
            numel = torch.tensor(list(sizes.values()), dtype=torch.float64, device=injector.device)
            way += float((share * (numel * injector.slots.aim_sq).sqrt()).sum())
            aim += float(injector.slots.aim_sq.sum())
        return rate * way / aim if aim > 0 else None

    def text(self) -> str:
        """The same as a sentence for a log, or nothing."""
        found = self.expected()
        if found is None:
            return ""
        return (
            f"; at learning rate {adam_rate(self._steppers):g} a step travels about {found:.1e}"
            " of the way"
        )


def _share(injector: Injector, nominal: float | None) -> Tensor | None:
    """r / sqrt(1 + r**2) with the sign of alpha, for every slot."""
    slots, grad_sq = injector.slots, injector.sums[:, GRAD_SQ]
    if bool(grad_sq.any()):
        delta_sq = slots.delta_sq + injector.sums[:, DELTA_SQ]
        ratio = (injector.strength.square() * delta_sq / grad_sq.clamp(min=1e-300)).sqrt()
    elif nominal is not None:
        ratio = slots.alpha.abs() * nominal
    else:
        return None
    return slots.alpha.sign() * ratio / (1.0 + ratio.square()).sqrt()


def _warn(ratio: float, alpha: float, step: int) -> None:
    warnings.warn(
        f"the bias is {ratio:,.0f} times the gradient at step {step:,}: beyond {TOO_STRONG:g} the"
        " data hardly count, and under Adam a larger alpha changes nothing any more.\nGive"
        f" alpha={alpha / ratio:.1g}, at which it is about as large as the gradient, instead of"
        f" {alpha:g}; or a rule that follows the gradient: rule='adaptive_cosine', alpha=1.0.",
        stacklevel=5,
    )


def bias_ratio(injectors: Sequence[Injector]) -> float | None:
    """|bias| / |g| of the last step over all tensors; None without gradients. Waits."""
    grad_sq = bias_sq = 0.0
    for injector in injectors:
        delta_sq = injector.slots.delta_sq + injector.sums[:, DELTA_SQ]
        grad_sq += float(injector.sums[:, GRAD_SQ].sum())
        bias_sq += float((injector.strength.square() * delta_sq).sum())
    ratio = sqrt(bias_sq / grad_sq) if grad_sq > 0 else None
    return ratio if ratio is not None and isfinite(ratio) else None


def adam_rate(steppers: Sequence[Any]) -> float | None:
    """The highest learning rate of optimizers whose steps are about that; None for others.

    A scheduler's first rate is often 0: the rate that it starts from counts.
    """
    rates = []
    for stepper in steppers:
        inner = getattr(stepper, "optimizer", stepper)  # DeepSpeed's wraps one of torch
        name = type(inner).__name__.lower()
        if not any(word in name for word in LIKE_ADAM):
            return None
        groups = getattr(stepper, "param_groups", [])
        rates += [float(group.get("initial_lr", group.get("lr", 0.0))) for group in groups]
    return max(rates, default=None) or None
