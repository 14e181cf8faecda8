"""Statistics of a pair of tensors as plain data, and how those of several add up.

The pair is (A, B): of a prior the reasoner and the mllm, of a merge the merge and its mllm, of
a comparison its two checkpoints. delta = A - B, or A - base in a prior that has a base.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod, sqrt
from typing import Any

from drift_merge.names.modules import canonical_order
from drift_merge.reports.places import LANGUAGE, PARTS, Place, place_of, place_order
from drift_merge.storage.measured import TensorRecord


@dataclass(frozen=True, slots=True)
class TensorFigures:
    """What is known of one pair of tensors; None: not measured, or not finite."""

    name: str  # canonical name in the language tower, else the stored one
    part: str  # of PARTS
    module: str  # attn, mlp, ... in the language tower; else its part
    shape: tuple[int, ...]
    norm_delta: float | None  # L2
    norm_a: float | None
    norm_b: float | None
    cosine: float | None  # of A and B, in [-1, 1]
    equal: float | None = None  # share of entries of delta that are exactly 0, in [0, 1]
    max_abs_delta: float | None = None
    # With a base: of the entries that both A and B have moved, the share moved to the same side.
    sign_agreement: float | None = None
    num_moved: int = 0  # entries that both have moved from the base
    stable_rank: float | None = None  # |delta|_F^2 / |delta|_2^2, from 1 to min(rows, cols)
    weight: float | None = None  # of a merge: sum of the weights of its reasoners
    change_kept: float | None = None  # of a merge: fraction of the change that rounding kept

    @property
    def numel(self) -> int:
        """Number of entries."""
        return prod(self.shape)

    @property
    def relative_norm(self) -> float | None:
        """|delta| / |B|; None where B is zero."""
        return _ratio(self.norm_delta, self.norm_b)


def _ratio(one: float | None, other: float | None) -> float | None:
    return one / other if one is not None and other else None


@dataclass(frozen=True, slots=True)
class FigureKind:
    """One statistic that a heat map shows."""

    key: str  # attribute of `Group`, and key in the data of a page
    label: str
    meaning: str  # one sentence
    is_share: bool = False  # shown in per cent


KINDS = (
    FigureKind("relative_norm", "Relative norm", "|delta| / |B|: how far A is from B."),
    FigureKind("cosine", "Cosine", "cos(A, B): 1 for equal directions, 0 for unrelated weights."),
    FigureKind("equal", "Exactly equal entries", "Share of entries where delta is 0.", True),
    FigureKind(
        "sign_agreement",
        "Sign agreement with the base",
        "Of the entries that A and B have both moved from the base, the share moved to the same "
        "side; 50 % is chance.",
        True,
    ),
    FigureKind(
        "stable_rank",
        "Stable rank",
        "|delta|_F^2 / |delta|_2^2: about how many directions delta has.",
    ),
)
OF_MERGES = (
    FigureKind("weight", "Weight", "Sum of the weights of the reasoners, as they were used."),
    FigureKind("change_kept", "Change kept", "What rounding kept of the change (sampled).", True),
)


@dataclass(frozen=True, slots=True)
class Group:
    """Statistics of some tensors as one vector; of one tensor its own."""

    tensors: tuple[TensorFigures, ...]

    def _known(self, *names: str) -> list[TensorFigures]:
        return [t for t in self.tensors if all(getattr(t, n) is not None for n in names)]

    def _norm(self, name: str) -> float | None:
        known = self._known(name)
        return sqrt(sum(getattr(t, name) ** 2 for t in known)) if known else None

    @property
    def numel(self) -> int:
        """Number of entries."""
        return sum(tensor.numel for tensor in self.tensors)

    @property
    def norm_delta(self) -> float | None:
        """L2."""
        return self._norm("norm_delta")

    @property
    def norm_b(self) -> float | None:
        """L2."""
        return self._norm("norm_b")

    @property
    def relative_norm(self) -> float | None:
        """|delta| / |B|."""
        return _ratio(self.norm_delta, self.norm_b)

    @property
    def cosine(self) -> float | None:
        """Of A and B over all tensors whose cosine is known."""
        known = self._known("cosine", "norm_a", "norm_b")
        triples = [(t.cosine or 0.0, t.norm_a or 0.0, t.norm_b or 0.0) for t in known]
        product = sum(cosine * a * b for cosine, a, b in triples)
        ours = sqrt(sum(a**2 for _, a, _ in triples))
        theirs = sqrt(sum(b**2 for *_, b in triples))
        return max(-1.0, min(1.0, product / (ours * theirs))) if ours * theirs else None

    @property
    def equal(self) -> float | None:
        """Share of equal entries."""
        return self._mean("equal", "numel")

    @property
    def sign_agreement(self) -> float | None:
        """Share of entries that are moved from the base to the same side."""
        return self._mean("sign_agreement", "num_moved")

    @property
    def stable_rank(self) -> float | None:
        """Mean over the matrices, by their entries."""
        return self._mean("stable_rank", "numel")

    @property
    def weight(self) -> float | None:
        """Mean of the weights, by entries."""
        return self._mean("weight", "numel")

    @property
    def change_kept(self) -> float | None:
        """Mean of what rounding kept, by entries."""
        return self._mean("change_kept", "numel")

    @property
    def max_abs_delta(self) -> float | None:
        """Largest |delta|."""
        return max((t.max_abs_delta or 0.0 for t in self._known("max_abs_delta")), default=None)

    @property
    def num_unknown(self) -> int:
        """Tensors that hold NaN or Inf, so that nothing can be said of them."""
        return len(self.tensors) - len(self._known("norm_delta"))

    def _mean(self, name: str, by: str) -> float | None:
        known = self._known(name)
        total = sum(getattr(t, by) for t in known)
        return sum(getattr(t, name) * getattr(t, by) for t in known) / total if total else None


def cells(tensors: Iterable[TensorFigures]) -> dict[Place, Group]:
    """Tensors by their places: parts in their order, layers by number, then what has none."""
    found: dict[Place, list[TensorFigures]] = {}
    for tensor in tensors:
        found.setdefault(place_of(tensor.name, tensor.part), []).append(tensor)
    return {place: Group(tuple(found[place])) for place in sorted(found, key=place_order)}


@dataclass(frozen=True, slots=True)
class Scale:
    """The ends of a scale of colours, and whether values lie beyond them."""

    low: float
    high: float
    has_lower: bool
    has_higher: bool


def scale_of(groups: Iterable[Group], key: str) -> Scale | None:
    """The scale of a statistic; None where it is known of no group.

    It leaves out a hundredth of the entries at each end, so that a few biases, or one odd tensor,
    do not hide how the matrices differ.
    """
    known = [(value, g.numel) for g in groups if (value := getattr(g, key)) is not None]
    if not known:
        return None
    known.sort()
    values = [value for value, _ in known]
    low, high = _widened(_inner(known), _inner(known[::-1]), key)
    return Scale(low, high, values[0] < low, values[-1] > high)


def _widened(low: float, high: float, key: str) -> tuple[float, float]:
    """A scale that spans a tenth of what it measures, so that noise does not look like a find."""
    middle = (low + high) / 2
    least = abs(1.0 - middle if key == "cosine" else middle) / 10
    if high == low or high - low >= least:
        return low, high
    return middle - least / 2, middle + least / 2


def _inner(values: Sequence[tuple[float, int]]) -> float:
    """The first value behind a hundredth of the entries."""
    rest = sum(numel for _, numel in values) / 100
    for value, numel in values:
        rest -= numel
        if rest < 0:
            return value
    return values[-1][0]


def modules(tensors: Sequence[TensorFigures]) -> dict[str, Group]:
    """Groups by module: those of the language tower, all of that, then the other parts."""
    order = ("attn", "mlp", "mixer", "norm", "embed", "head", "other")
    tower = [t for t in tensors if t.part == LANGUAGE]
    rows = {m: Group(tuple(t for t in tower if t.module == m)) for m in order}
    rows["all of the tower"] = Group(tuple(tower))
    for part in PARTS[1:]:
        rows[part if part != "other" else "other parts"] = Group(
            tuple(t for t in tensors if t.part == part)
        )
    return {name: group for name, group in rows.items() if group.tensors}


def largest(tensors: Iterable[TensorFigures], count: int = 10) -> list[TensorFigures]:
    """The tensors with the largest |delta|; those that are not finite are left out."""
    known = [tensor for tensor in tensors if tensor.norm_delta is not None]
    return sorted(known, key=lambda t: (-(t.norm_delta or 0.0), t.name))[:count]


def of_prior(tensors: Mapping[str, TensorRecord]) -> list[TensorFigures]:
    """The figures that the manifest of a prior records, in the order of a model."""
    found = []
    for name in sorted(tensors, key=canonical_order):
        entry: Mapping[str, Any] = tensors[name]
        is_zero = not entry["norm_reasoner"] or not entry["norm_mllm"]  # 0, or not finite
        found.append(
            TensorFigures(
                name,
                LANGUAGE,
                str(entry["module"]),
                tuple(entry["shape"]),
                norm_delta=entry["norm_delta"],
                norm_a=entry["norm_reasoner"],
                norm_b=entry["norm_mllm"],
                cosine=None if is_zero else entry["cosine"],
                equal=entry.get("equal"),
                max_abs_delta=entry["max_abs_delta"],
            )
        )
    return found
