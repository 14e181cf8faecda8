"""What the adapters of trainers share: an optional package, the options, one handle a training.

The adapters are a few lines each over `attach` and `Handle`; none has rules of its own.
"""

import inspect
from collections.abc import Mapping
from importlib import import_module
from typing import Any

from drift_merge.errors import RecipeError, nearest
from drift_merge.training.attach import attach
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

    def start(self, model: Any, **given: Any) -> Handle:
        """Attach anew; a handle that an earlier training has left is removed first."""
        self.stop()
        self.handle = attach(model, self.prior, **self.options, **given)
        return self.handle

    def stop(self) -> None:
        """Remove the handle, if there is one."""
        if self.handle is not None:
            self.handle.remove()
            self.handle = None
