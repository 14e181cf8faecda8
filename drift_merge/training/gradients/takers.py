"""Finds who takes gradients during backward(), before a bias once per step can reach them.

So do optimizers that step in backward, layerwise and offloading ones, by hooks that run when the
gradient of a parameter is complete.
"""

import warnings
from collections.abc import Iterator, Sequence
from typing import Protocol

from torch import nn

from drift_merge.errors import RecipeError


class Owner(Protocol):
    """A gradient that is to be biased."""

    @property
    def parameters(self) -> Sequence[nn.Parameter]:
        """Whose it is."""

    @property
    def parameter_names(self) -> Sequence[str]:
        """Their names."""


class GradientTakers:
    """Looks at what was missing at each step, and warns once."""

    def __init__(self) -> None:
        self._is_warned = False

    def look(self, owners: Sequence[tuple[Owner, bool]]) -> None:
        """Refuse gradients that were taken; warn of those that may have been, and of most missing.

        Args:
            owners: of all gradients to be biased, and whether theirs was missing at the step.

        Raises:
            RecipeError: some are missing and their parameters have such hooks.
        """
        missing = [owner for owner, is_missing in owners if is_missing]
        if missing:
            self._refuse_taken(missing, len(owners))
        if self._is_warned:
            return
        kept = [name for owner, _ in owners for name in _hooked(owner)]
        if kept:
            self._warn(
                f"{len(kept):,} of {len(owners):,} tensors have hooks that run when a gradient is"
                f" complete, e.g. {kept[0]}: what these take in backward() has no bias."
            )
        elif 2 * len(missing) > len(owners):
            self._warn(
                f"{len(missing):,} of {len(owners):,} tensors have no gradient at this step, e.g."
                f" {missing[0].parameter_names[0]}: they get no bias. (report() counts them at"
                " every step.)"
            )

    def _refuse_taken(self, missing: Sequence[Owner], total: int) -> None:
        taken = [name for owner in missing for name in _hooked(owner)]
        if taken:
            raise RecipeError(
                f"{len(missing):,} of {total:,} tensors have no gradient at the step but hooks that"
                f" run in backward(), e.g. {taken[0]}: these have taken it, without a bias.",
                remedy="Step all parameters by an ordinary optimizer after backward(): not during"
                " backward, not layerwise, not by an offloading optimizer.",
            )

    def _warn(self, message: str) -> None:
        self._is_warned = True
        warnings.warn(message, stacklevel=6)


def _hooked(owner: Owner) -> Iterator[str]:
    for name, parameter in zip(owner.parameter_names, owner.parameters, strict=False):
        if getattr(parameter, "_post_accumulate_grad_hooks", None):
            yield name
