"""What the table of methods holds of each: its formula, its needs, its defaults, its two phases.

Plain data: torch is imported when a function of a method is asked for, so that `--help` and
`--dry-run` answer at once.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any, cast

from drift_merge.maths.methods.options import OPTIONS, Option

if TYPE_CHECKING:
    from torch import Tensor

    from drift_merge.maths.chunks import Chunk, MethodSettings, Read

MethodState = Any  # what a method's `measure` found and its `combine` takes; private to the method
Measure = Callable[["Read", "MethodSettings"], MethodState]
Combine = Callable[["Chunk", MethodState, "MethodSettings"], "Tensor"]
Value = float | bool | str  # of an option
Defaults = Mapping[str, Mapping[str, Value]]
# Sums what a function counts of each tensor, by group, in the order of the plan.
Total = Callable[[Callable[["Read"], "Tensor"]], dict[str, "Tensor"]]

LAYER = "layer "  # and its number: a group of a survey by layer
WEIGHTS = ("weight", "mllm_weight")  # options of every row that are numbers per tensor, not of it
# Of rows that may take a spectral step; these values ask for none.
SPECTRAL: Mapping[str, Value] = {
    **{"rank": 0, "eta": 0.0, "bands": "none", "gates": "none", "norm": "frobenius"},
}
# Of rows on a base: what may become of their result.
CALIBRATION: Mapping[str, Value] = {"calibrate": "none", "calibrate_alpha": 0.1}


@dataclass(frozen=True, slots=True, kw_only=True)
class Survey:
    """A look at the whole model before any tensor is made, when an option has a certain value.

    Its function takes (total, entries by group, settings) and returns what it found by group.
    """

    option: str  # "weight", or an option of the method
    value: str
    walks: int  # over all inputs
    by: str  # "module.function" in this room
    by_layer: bool = False  # a group for each layer, and each module outside; else all are one
    gives_weights: bool = False  # found: the weights (mllm, reasoners...); else combine's state

    @property
    def function(self) -> Callable[[Total, Mapping[str, int], "MethodSettings"], dict[str, Any]]:
        """See the class."""
        return _function(self.by)


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """One merge method: what a user must know of it, and where its pure functions are."""

    name: str
    summary: str  # what it does, in words, for `--help`
    formula: str  # one line, in ASCII
    paper: str  # arXiv id and equation or section, or where it comes from
    base: str  # "none", "required" or "optional"
    reasoners: tuple[int, int | None] = (1, None)  # least and most number; None: any
    defaults: Defaults  # per variant: option -> default; the first variant is the default
    required: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    # per variant: options without a default, which the user must give
    notes: Mapping[str, str] = field(default_factory=dict)  # per variant: what differs
    adds_to_mllm: bool = False  # mllm + weight * something: with weight 0 the mllm is copied
    takes_matrices: bool = False  # whole projections; what is none of them gets the plain mean
    row_wise: bool = False  # chunks must be whole rows of shape[-1]; a 1-D tensor is one row
    combined_by: str | Combine  # "module.function" in this package, or a user's own
    measured_by: str | Measure = ""  # likewise; "": the chunks need no look at the whole tensor
    surveys: tuple[Survey, ...] = ()  # looks at the whole model, by an option's value
    own_options: Mapping[str, Option] = field(default_factory=dict)  # that OPTIONS lacks
    source: str = ""  # of a user's own method: fingerprint of its text, so that a rerun knows it

    @property
    def variants(self) -> tuple[str, ...]:
        """The variants that it has; the first is the default."""
        return tuple(self.defaults)

    @property
    def combine(self) -> Combine:
        """From the chunks of the inputs to the chunk of the output; in order, once each."""
        by = self.combined_by
        return cast(Combine, _function(by)) if isinstance(by, str) else by

    @property
    def measure(self) -> Measure | None:
        """From walks over the tensor to the state that `combine` takes; None if none is needed."""
        by = self.measured_by
        return cast(Measure, _function(by)) if isinstance(by, str) and by else by or None

    def takes(self, name: str, variant: str) -> bool:
        """Whether a variant has an option or weight."""
        return name in self.defaults[variant] or name in self.required.get(variant, ())

    def option_names(self, variant: str | None = None) -> list[str]:
        """The options of a variant, or of any, beside the weights; sorted."""
        listed = self.variants if variant is None else (variant,)
        names = {n for v in listed for n in (*self.defaults[v], *self.required.get(v, ()))}
        return sorted(names - {*WEIGHTS})

    def option(self, name: str) -> Option:
        """What an option is."""
        return self.own_options[name] if name in self.own_options else OPTIONS[name]


@cache
def _function(path: str) -> Callable[..., Any]:
    module, name = path.rsplit(".", 1)
    function: Callable[..., Any] = getattr(import_module(f"{__package__}.{module}"), name)
    return function
