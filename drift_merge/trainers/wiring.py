"""What the adapters of trainers share: an optional package, the options, one handle a training.

The adapters are a few lines each over `attach` and `Handle`; none has rules of its own.
"""

import inspect
import weakref
from collections.abc import Mapping
from importlib import import_module
from typing import Any

import torch

from drift_merge.errors import RecipeError, VerificationError, nearest
from drift_merge.priors.manifest import Prior
from drift_merge.training.attach import attach
from drift_merge.training.deltas.opened import load_prior
from drift_merge.training.gradients.hooks import is_idle, parameters_of
from drift_merge.training.guard import watch_steps
from drift_merge.training.handle import Handle

_OURS = ("optimizer", "total_steps", "state")  # what an adapter itself gives to attach()


def optional(module: str, *, install: str) -> Any:
    """Import a package that drift_merge does not depend on.

    Args:
        module: dotted name.
        install: the command that brings it.

    Raises:
        RecipeError: it is not installed, or does not import; says why and how to install it.
    """
    try:
        return import_module(module)
    except ImportError as error:
        missing = getattr(error, "name", None) or module
        raise RecipeError(
            f"this adapter needs {module}, which cannot be imported: {error}.",
            remedy=f"Install it with: {install}"
            + ("" if module.split(".")[0] == missing.split(".")[0] else f" (and {missing})"),
        ) from error


def options_of_attach() -> list[str]:
    """What a user of an adapter may say: the options of attach() but those the trainer gives."""
    return [
        name
        for name, parameter in inspect.signature(attach).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY and name not in _OURS
    ]


class Expectation:
    """Until the training with a prior begins, a step of an optimizer is an error."""

    def __init__(self, message: str, remedy: str, model: Any = None) -> None:
        """Begin to watch.

        Args:
            message: what has gone wrong if there is such a step.
            remedy: the way out.
            model: whose parameters are meant; None for any step in this process.
        """
        self._message, self._remedy = message, remedy
        self._model = None if model is None else weakref.ref(model)
        self._undo = watch_steps(self._after_step)

    def end(self) -> None:
        """Training has begun, or will not."""
        self._undo()

    def _after_step(self, optimizer: torch.optim.Optimizer) -> None:
        if not is_idle(optimizer) and self._is_meant(optimizer):
            raise RecipeError(self._message, remedy=self._remedy)

    def _is_meant(self, optimizer: torch.optim.Optimizer) -> bool:
        if self._model is None:
            return True
        model = self._model()
        ours = set() if model is None else {id(parameter) for parameter in model.parameters()}
        return not ours.isdisjoint(map(id, parameters_of(optimizer)))


class Wiring:
    """The prior and options of a callback, checked when it is made, and its handle in training."""

    def __init__(self, prior: Any, options: Mapping[str, Any]) -> None:
        """Check the names of the options, so that a typo fails before a model is loaded.

        Raises:
            RecipeError: an option that attach() does not have, or that the trainer provides.
        """
        choices = options_of_attach()
        for name in options:
            if name not in choices:
                raise RecipeError(
                    f"there is no option {name!r}.{nearest(name, choices)}",
                    remedy=f"Options: {', '.join(choices)}. The trainer provides the optimizer and"
                    " the number of steps.",
                )
        self.prior, self.options = prior, dict(options)
        self.handle: Handle | None = None
        self.expectations: list[Expectation] = []
        self._num_biased = 0  # of the handle, when it was last compared with the trainer's steps
        self._earlier: tuple[Any, int] | None = None  # a model that was trained, and its steps

    def start(self, model: Any, **given: Any) -> Handle:
        """Attach anew; a handle that an earlier training has left is removed first.

        Args:
            model: as for `attach`.
            given: what the trainer provides. An adapter that calls `apply()` itself gives no
                optimizer at all.

        Raises:
            RecipeError: the optimizer is given as None; or as for `attach`.
            VerificationError: as for `attach`; this model was trained by the callback before.
        """
        self.stop()
        for expectation in self.expectations:
            expectation.end()
        if "optimizer" in given and given["optimizer"] is None:
            raise RecipeError(
                "the trainer gives its callbacks no optimizer (None): nothing could be biased.",
                remedy="Call attach(model, prior, optimizer=optimizer) where the optimizer is made"
                " (drift-prior guide own-trainer).",
            )
        earlier = self._steps_of(model)
        try:
            self.handle = attach(model, self.prior, **self.options, **given)
        except VerificationError as error:
            if earlier and given.get("state") is None:
                raise _trained_before(earlier) from error
            raise
        self._num_biased = self.handle.num_biased
        self._earlier = (weakref.ref(model), 0)
        return self.handle

    def require_biased(self, made: int = 1) -> None:
        """Compare with the trainer: it has made `made` steps since this was last called.

        Args:
            made: without those that a scaler has skipped.

        Raises:
            RecipeError: fewer were biased.
        """
        if self.handle is None:
            return
        biased = self.handle.num_biased - self._num_biased
        self._num_biased = self.handle.num_biased
        if biased < made:
            raise RecipeError(
                f"the trainer has made {made:,} step{'s' if made > 1 else ''} of which"
                f" {biased:,} had the bias (before that {self.handle.steps:,} in all): it does not"
                " step the optimizer that it gave to its callbacks.",
                remedy="If the optimizer is made anew during training, or steps during backward(),"
                " use an ordinary one; or attach() to the one that steps"
                " (drift-prior guide own-trainer).",
            )

    def seals(self) -> list[str]:
        """The fingerprints of the priors, which are opened for it."""
        given = self.prior if isinstance(self.prior, list | tuple) else [self.prior]
        self.prior = [one if isinstance(one, Prior) else load_prior(one) for one in given]
        return [str(one.manifest.get("seal")) for one in self.prior]

    def stop(self) -> None:
        """Remove the handle, if there is one."""
        if self.handle is not None:
            if self._earlier is not None:
                self._earlier = (self._earlier[0], self.handle.steps)
            self.handle.remove()
            self.handle = None

    def _steps_of(self, model: Any) -> int:
        if self._earlier is None or self._earlier[0]() is not model:
            return 0
        return self._earlier[1]


def _trained_before(steps: int) -> VerificationError:
    return VerificationError(
        f"this callback has trained this model for {steps:,} steps already, so that it no longer"
        " has the weights of the prior: a second train(), or auto_find_batch_size, which begins"
        " anew with the weights as an out-of-memory error has left them.",
        remedy="With auto_find_batch_size: set per_device_train_batch_size yourself, and make the"
        " model anew. For a second stage: compute a prior against the weights as they are, or"
        " DriftCallback(..., strict=False) to keep this one. To go on with the first:"
        " train(resume_from_checkpoint=...)",
    )
