"""Every option that a merge method may take: its kind, its range and what the help says of it.

Written once: the command line, YAML files, sweeps and Python follow from this table. Which method
has which option, with which default, stands in the method's row (`entries.py`).
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from drift_merge.errors import RecipeError, one_of
from drift_merge.maths.spectra.bands import parse_bands


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """One option: `name` in Python, `--long-name` on the command line, `long-name` in a file."""

    name: str
    kind: type  # float, int, bool, str or Path
    help: str  # a sentence
    metavar: str = ""  # what stands for the value in the help
    choices: tuple[str, ...] = ()  # of text
    is_many: bool = False  # may be given once for each reasoner
    accepts: Callable[[Any], bool] = lambda _: True
    expected: str = ""  # what `accepts` accepts, in words
    is_internal: bool = False  # set by a command, not by its user
    key: str = ""  # the long name, where it is another than the name's

    @property
    def long_name(self) -> str:
        """As files and the command line write it, without dashes before."""
        return self.key or self.name.replace("_", "-")

    def check(self, value: object) -> None:
        """Refuse a value of another kind or out of range.

        Raises:
            RecipeError: naming the option, the value and what is expected.
        """
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        is_number = is_number and math.isfinite(value)  # type: ignore[arg-type]
        if self.choices:
            one_of(f"--{self.long_name}", str(value), list(self.choices))
        elif self.kind is bool and not isinstance(value, bool):
            raise self._wrong(value, "true or false")
        elif self.kind is float and not is_number:
            raise self._wrong(value, "a finite number")
        elif self.kind is int and not (is_number and value == int(value)):  # type: ignore[call-overload]
            raise self._wrong(value, "a whole number")
        elif self.kind is str and not isinstance(value, str):
            raise self._wrong(value, "text")
        elif not self.accepts(value):
            raise self._wrong(value, self.expected)

    def _wrong(self, value: object, expected: str) -> RecipeError:
        return RecipeError(
            f"{self.long_name} is {value!r}; expected {expected}.",
            remedy=f"Give --{self.long_name} such a value, or leave it out for the default.",
        )


def _number(name: str, help: str, accepts: Any = None, expected: str = "") -> Option:
    holds = accepts or (lambda _: True)
    return Option(name=name, kind=float, help=help, metavar="X", accepts=holds, expected=expected)


def _not_negative(name: str, help: str) -> Option:
    return _number(name, help, lambda x: x >= 0, "0 or more")


def _flag(name: str, help: str, *, is_internal: bool = False) -> Option:
    return Option(name=name, kind=bool, help=help, is_internal=is_internal)


def _is_bands(text: str) -> bool:
    try:
        return text == "none" or bool(parse_bands(text))
    except ValueError:
        return False


_TABLE = (
    _number("agreement", "Number of models that must find an entry important."),
    Option(
        name="bands",
        kind=str,
        metavar="BANDS",
        help="Factors of the singular directions by number, 0:16=0.1,16:64=0.05; others get 0.",
        accepts=_is_bands,
        expected="none, or FIRST:END=FACTOR joined by commas, each direction once",
    ),
    _not_negative("boost", "How much larger what one model alone has changed becomes."),
    Option(
        name="calibrate",
        kind=str,
        choices=("none", "svc"),
        help="Singular values of the result, so that shared directions count once.",
    ),
    _not_negative("calibrate_alpha", "Least share of a model in a direction, of svc."),
    _flag("column_wise", "One angle per column instead of per row."),
    _number(
        "common",
        "Share of the directions that come from the sum of all models.",
        lambda x: 0 <= x <= 1,
        "a number in [0, 1]",
    ),
    Option(
        name="counts",
        kind=str,
        choices=("tensor", "global"),
        help="Of changed entries: in each tensor, or over the model.",
    ),
    _number(
        "density",
        "Fraction of the entries that is kept, in (0, 1].",
        lambda x: 0 < x <= 1,
        "a number in (0, 1]",
    ),
    _number("dot_threshold", "Above this |cosine| a line replaces the arc."),
    _not_negative("eps", "Below this norm a model counts as zero."),
    _not_negative("epsilon", "Half the spread of the keep probabilities around the density."),
    _number(
        "eta",
        "Keep the fewest directions whose singular values sum to this percentage; 0: all.",
        lambda x: 0 <= x <= 100,
        "a number in [0, 100]",
    ),
    _flag("filter_wise", "One coefficient per row instead of per tensor."),
    _flag("flatten", "One angle per tensor instead of per row."),
    _not_negative("frank_decay", "How fast the mllm's share falls with the layers; 0: not at all."),
    _number(
        "gamma",
        "Fraction of the largest entries that is dropped.",
        lambda x: 0 <= x < 1,
        "a number in [0, 1)",
    ),
    _flag("is_delta", "The reasoners are priors.", is_internal=True),  # of `drift-prior apply`
    Option(
        name="gates",
        kind=str,
        metavar="FILE",
        help="Safetensors with a factor for each singular direction, by canonical name.",
    ),
    Option(name="keep_layers", kind=str, metavar="RANGES", help="Layers that stay the mllm's."),
    _number("mask_lambda", "How much of the others an entry must outweigh to be important."),
    _not_negative("max_overlap", "Largest ratio of shared to own entries that counts."),
    _number(
        "max_iter",
        "Most steps towards the mean.",
        lambda x: x >= 1 and x == int(x),
        "a whole number, 1 or more",
    ),
    Option(
        name="norm",
        kind=str,
        choices=("frobenius", "nuclear", "none"),
        help="Of the whole matrix, that the directions kept get.",
    ),
    _flag("normalize", "Divide by the sum of the weights."),
    Option(
        name="rank",
        kind=int,
        metavar="K",
        help="Singular directions that are kept of each matrix, the leading ones; 0: all.",
        accepts=lambda x: x >= 0,
        expected="0 or more",
    ),
    _flag("rescale", "Make up for what was dropped."),
    _number("scale", "Factor of what is added."),
    _number(
        "share",
        "Of the directions, the largest, that are solved for.",
        lambda x: 0 < x <= 1,
        "a number in (0, 1]",
    ),
    Option(name="seed", kind=int, metavar="N", help="Of the masks."),
    _number("t", "From the mllm (0) to the reasoner (1); in nearswap the largest step."),
    _not_negative("threshold", "Up to this |tau| a model has not changed an entry."),
    _not_negative("time", "Of the flow towards the optimum: small directions move less."),
    _not_negative("tol", "Step at which the mean is found."),
    Option(
        name="transition",
        kind=int,
        metavar="N",
        help="Layers beside the kept ones that get half the weight.",
        accepts=lambda x: x >= 0,
        expected="0 or more",
    ),
    Option(
        name="trim",
        kind=str,
        choices=("tensor", "global"),
        help="One threshold per tensor, or one per task vector as in the paper.",
    ),
)

OPTIONS: Mapping[str, Option] = {option.name: option for option in _TABLE}
