"""Weights as a user writes them, resolved to one number per tensor.

    0.1                       every selected tensor
    attn=0.1,mlp=0.3          by module; a bare number among them is for the others
    [0,0.5,1]                 a gradient over the layers, first to last, linear in between
    mlp=[0,0.5],0.1           both
    re:o_proj=0.2,0.1         canonical names that a regex finds; regexes come before modules

    frank                     task-arithmetic: one weight per layer, measured (maths/methods/frank)

A tensor that no term covers is an error, never a silent 0.
"""

import math
import re
from dataclasses import dataclass

from drift_merge.errors import RecipeError
from drift_merge.maths.methods import METHODS
from drift_merge.names.modules import CHOICES

MODULES = tuple(name for name in CHOICES if name != "full")  # those that a tensor can be of

# Words of methods that measure the weights themselves.
MEASURED = frozenset(
    survey.value
    for method in METHODS.values()
    for survey in method.surveys
    if survey.option == "weight"
)
# Tensors outside the layers stand at an end of a gradient: the embedding before, the rest after.
_FIRST = ("embed",)


@dataclass(frozen=True, slots=True)
class Term:
    """One term of a weight."""

    key: str | None  # a module, "re:REGEX", or None for every other tensor
    values: tuple[float, ...]  # one number, or the points of a gradient

    def covers(self, canonical: str, module: str) -> bool:
        """Whether the term is for a tensor."""
        if self.key is None:
            return True
        if self.key.startswith("re:"):
            return re.search(self.key.removeprefix("re:"), canonical) is not None
        return self.key == module

    @property
    def rank(self) -> int:
        """Regexes first, then modules, then the rest."""
        return 2 if self.key is None else 0 if self.key.startswith("re:") else 1


@dataclass(frozen=True, slots=True)
class Weight:
    """A weight as written, parsed."""

    text: str
    terms: tuple[Term, ...]  # in the order in which they are tried
    option: str = "--weight"  # what it was given as

    @property
    def is_measured(self) -> bool:
        """Whether the weights are measured when the merge runs."""
        return self.text in MEASURED

    @property
    def plain(self) -> float | str:
        """For a manifest: the number if it is the same for every tensor, else the text."""
        return self.text if self.is_measured or self.constant is None else self.constant

    @property
    def constant(self) -> float | None:
        """The number if it is the same for every tensor; 1 where it is measured."""
        is_one = len(self.terms) == 1 and self.terms[0].key is None
        return self.terms[0].values[0] if is_one and len(self.terms[0].values) == 1 else None

    def resolve(self, canonical: str, module: str, layer: int | None, num_layers: int) -> float:
        """The number for one tensor.

        Args:
            canonical: canonical name.
            module: attn, mlp, mixer, norm, embed, head or other.
            layer: canonical layer number, None outside the layers.
            num_layers: of the language tower.

        Raises:
            RecipeError: no term covers the tensor.
        """
        for term in self.terms:
            if term.covers(canonical, module):
                return _at(term.values, module, layer, num_layers)
        raise RecipeError(
            f"{self.option} {self.text} gives no weight for {canonical} ({module}).",
            remedy=f"Add a bare number for all others: {self.option} '{self.text},0.1'",
        )


def _at(values: tuple[float, ...], module: str, layer: int | None, num_layers: int) -> float:
    if len(values) == 1:
        return values[0]
    if layer is None:
        return values[0] if module in _FIRST else values[-1]
    place = layer / max(1, num_layers - 1) * (len(values) - 1)
    lower = min(int(place), len(values) - 2)
    share = place - lower
    return values[lower] * (1.0 - share) + values[lower + 1] * share


def parse_weight(text: str | float, *, option: str = "--weight") -> Weight:
    """Parse a weight.

    Raises:
        RecipeError: naming the term that cannot be understood.
    """
    written = str(text).strip()
    if written in MEASURED:
        return Weight(written, (Term(None, (1.0,)),))  # a place for what the run will measure
    terms = [_parse_term(term, written, option) for term in _split(written)]
    if len({term.key for term in terms}) != len(terms):
        raise _invalid(option, written, "it names one thing twice")
    return Weight(written, tuple(sorted(terms, key=lambda term: term.rank)), option)


def _split(text: str) -> list[str]:
    """Split at the commas outside brackets."""
    terms, depth = [""], 0
    for character in text:
        depth += (character in "[({") - (character in "])}")
        if character == "," and depth == 0:
            terms.append("")
        else:
            terms[-1] += character
    return [term.strip() for term in terms]


def _parse_term(text: str, whole: str, option: str) -> Term:
    key, equals, value = text.rpartition("=")
    if equals and not key.startswith("re:") and key not in MODULES:
        raise _invalid(option, whole, f"{key!r} is no module")
    if key.startswith("re:"):
        try:
            re.compile(key.removeprefix("re:"))
        except re.error as error:
            raise _invalid(option, whole, f"{key!r} is no regular expression ({error})") from error
    numbers = value.strip()
    is_list = numbers.startswith("[") and numbers.endswith("]")
    try:
        items = numbers[1:-1].split(",") if is_list else [numbers]
        values = tuple(float(item) for item in items)
    except ValueError as error:
        raise _invalid(option, whole, f"{value!r} is no number") from error
    if not all(map(math.isfinite, values)):
        raise _invalid(option, whole, "a weight must be finite")
    return Term(key if equals else None, values)


def _invalid(option: str, text: str, why: str) -> RecipeError:
    return RecipeError(
        f"{option} {text!r} cannot be used: {why}.",
        remedy="Write a number (0.1), modules (attn=0.1,mlp=0.3), a gradient over the layers "
        "([0,0.5,1]) or re:REGEX=0.2.",
    )
