"""What the table of methods holds of each: its formula, its needs, its defaults, its two phases.

Without torch: the functions are named, and imported when a tensor is merged, so that help and
dry runs answer at once.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from drift_merge.maths.chunks import Chunk, Read, Settings

State = Any  # what a method's `measure` found and its `combine` takes; private to the method
Measure = Callable[["Read", "Settings"], State]
Combine = Callable[["Chunk", State, "Settings"], "Tensor"]
Defaults = Mapping[str, Mapping[str, float | bool]]


@dataclass(frozen=True, slots=True)
class Method:
    """One merge method: pure functions and what a user must know of them."""

    name: str
    formula: str  # one line, in ASCII
    paper: str  # arXiv id and equation or section, or where it comes from
    base: str  # "none", "required" or "optional"
    reasoners: tuple[int, int | None]  # least and most number; None: any
    defaults: Defaults  # per variant: option -> default
    combine_at: str  # module.function beside this file: see `combine`
    measure_at: str | None = None  # see `measure`
    row_wise: bool = False  # chunks must be whole rows of shape[-1]; a 1-D tensor is one row
    required: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    # per variant: options without a default, which the user must give
    notes: Mapping[str, str] = field(default_factory=dict)  # per variant: what differs

    @property
    def variants(self) -> tuple[str, ...]:
        """The variants that it has; the first is the default."""
        return tuple(self.defaults)

    @property
    def combine(self) -> Combine:
        """The chunk of the output; chunks come in order, once each."""
        function: Combine = _function(self.combine_at)
        return function

    @property
    def measure(self) -> Measure | None:
        """The look at the whole tensor before, or None for methods that need none."""
        return None if self.measure_at is None else _function(self.measure_at)


def _function(place: str) -> Any:
    module, _, name = place.partition(".")
    return getattr(import_module(f"drift_merge.maths.methods.{module}"), name)
