"""What the table of methods holds of each: its formula, its needs, its defaults, its two phases.

Plain data: torch is imported when a function of a method is asked for, so that `--help` and
`--dry-run` answer at once.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from torch import Tensor

    from drift_merge.maths.chunks import Chunk, MethodSettings, Read

MethodState = Any  # what a method's `measure` found and its `combine` takes; private to the method
Measure = Callable[["Read", "MethodSettings"], MethodState]
Combine = Callable[["Chunk", MethodState, "MethodSettings"], "Tensor"]
Defaults = Mapping[str, Mapping[str, float | bool]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """One merge method: what a user must know of it, and where its pure functions are."""

    name: str
    formula: str  # one line, in ASCII
    paper: str  # arXiv id and equation or section, or where it comes from
    base: str  # "none", "required" or "optional"
    reasoners: tuple[int, int | None]  # least and most number; None: any
    defaults: Defaults  # per variant: option -> default; the first variant is the default
    required: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    # per variant: options without a default, which the user must give
    notes: Mapping[str, str] = field(default_factory=dict)  # per variant: what differs
    row_wise: bool = False  # chunks must be whole rows of shape[-1]; a 1-D tensor is one row
    combined_by: str  # "module.function" in this package
    measured_by: str = ""  # likewise; "": the chunks need no look at the whole tensor

    @property
    def variants(self) -> tuple[str, ...]:
        """The variants that it has; the first is the default."""
        return tuple(self.defaults)

    @property
    def combine(self) -> Combine:
        """From the chunks of the inputs to the chunk of the output; in order, once each."""
        return cast(Combine, _function(self.combined_by))

    @property
    def measure(self) -> Measure | None:
        """From walks over the tensor to the state that `combine` takes; None if none is needed."""
        return cast(Measure, _function(self.measured_by)) if self.measured_by else None


@cache
def _function(path: str) -> Callable[..., Any]:
    module, name = path.split(".")
    function: Callable[..., Any] = getattr(import_module(f"{__package__}.{module}"), name)
    return function


def known_options(method: Method, variant: str) -> list[str]:
    """The options that a variant of a method takes beside the weights, sorted."""
    names = {*method.defaults[variant], *method.required.get(variant, ())}
    return sorted(names - {"weight", "mllm_weight"})
