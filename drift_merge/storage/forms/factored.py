"""How a delta of low rank is named and shaped on disk: two thin matrices in its place.

    delta = U V^T,  NAME:u = U (m, k),  NAME:v = V (n, k)

Singular values are inside, their roots on either side. A tensor that holds several matrices
(fused projections, experts) has the factors of each, one below the other in the order of `places`;
a matrix of fewer directions than k has columns of zeros. No canonical name ends like these.

Names and shapes only; the arithmetic is `maths.lowrank`.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

from drift_merge.errors import CheckpointError
from drift_merge.storage.headers import TensorInfo
from drift_merge.storage.measured import TensorRecord

U_SUFFIX, V_SUFFIX = ":u", ":v"
_SPAN = r"\d{1,18}:\d{1,18}"
_PLACE = re.compile(rf"({_SPAN}(?:\+{_SPAN})*);({_SPAN}(?::\d{{1,18}})?)(;T)?")

Span = tuple[int, int]  # from, to


@dataclass(frozen=True, slots=True)
class Place:
    """Where a matrix lies in its tensor; the plain data of `maths.spectra.matrices.Matrix`."""

    rows: tuple[Span, ...]
    cols: tuple[int, int, int]  # from, to, step
    is_transposed: bool = False

    @property
    def height(self) -> int:
        """Number of rows."""
        return sum(end - begin for begin, end in self.rows)

    @property
    def width(self) -> int:
        """Number of columns."""
        return len(range(*self.cols))

    def text(self) -> str:
        """As a manifest has it: `0:512+1024:1536;0:64:2;T`."""
        rows = "+".join(f"{begin}:{end}" for begin, end in self.rows)
        begin, end, step = self.cols
        cols = f"{begin}:{end}" + (f":{step}" if step != 1 else "")
        return f"{rows};{cols}" + (";T" if self.is_transposed else "")


@dataclass(frozen=True, slots=True)
class StoredFactors:
    """The factors of one delta."""

    u: str  # stored names
    v: str
    places: tuple[Place, ...]  # of its matrices


def parse_place(text: str) -> Place:
    """The inverse of `Place.text`.

    Raises:
        ValueError: it is not such a text.
    """
    found = _PLACE.fullmatch(text)
    if found is None:
        raise ValueError(f"{text!r} is not the place of a matrix")
    rows = tuple(_numbers(part) for part in found[1].split("+"))
    begin, end, *step = _numbers(found[2])
    place = Place(tuple((a, b) for a, b in rows), (begin, end, *(step or [1])), bool(found[3]))  # type: ignore[arg-type]
    if place.cols[2] == 0 or place.width < 1 or any(a >= b for a, b in place.rows):
        raise ValueError(f"{text!r} is an empty place")
    return place


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(":")))


def whole_place(shape: Sequence[int]) -> Place:
    """The place of a tensor that is one matrix."""
    return Place(((0, prod(shape[:-1])),), (0, shape[-1], 1))


def places_of(entry: TensorRecord) -> tuple[Place, ...]:
    """Where the matrices of a tensor lie, as its manifest says; one that says nothing is whole."""
    texts = entry.get("places")
    return tuple(map(parse_place, texts)) if texts else (whole_place(entry["shape"]),)


def factor_shapes(places: Sequence[Place], rank: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """The shapes of U and V of a tensor."""
    return (sum(p.height for p in places), rank), (sum(p.width for p in places), rank)


def find_factors(
    tensors: Mapping[str, TensorInfo], entries: Mapping[str, TensorRecord], where: str
) -> tuple[dict[str, StoredFactors], dict[str, TensorInfo]]:
    """The factors among the tensors of a prior, and the deltas that they stand for.

    Args:
        tensors: of its headers.
        entries: the manifest's, which say where matrices lie; without them a delta is a matrix.
        where: the prior, for messages.

    Returns:
        By the name of the delta: its factors, and what a header would say of it, if it were
        stored: float32, no bytes.

    Raises:
        CheckpointError: a factor is alone, or factors and manifest do not fit.
    """
    owners = {n.removesuffix(s) for s in (U_SUFFIX, V_SUFFIX) for n in tensors if n.endswith(s)}
    factors, deltas = {}, {}
    for name in sorted(owners):
        u, v = tensors.get(name + U_SUFFIX), tensors.get(name + V_SUFFIX)
        try:
            if u is None or v is None:
                raise ValueError(f"{name}{V_SUFFIX if v is None else U_SUFFIX} is missing")
            shape = (u.shape[0], v.shape[0])
            places: tuple[Place, ...] = (whole_place(shape),)
            if name in entries:
                places, shape = places_of(entries[name]), tuple(entries[name]["shape"])  # type: ignore[assignment]
            _require_fit(places, shape, u, v)
        except (ValueError, IndexError, TypeError) as error:
            raise CheckpointError(
                f"{where}: the factors of {name} do not fit: {error}.",
                remedy="Make or download the directory again.",
            ) from error
        factors[name] = StoredFactors(u.name, v.name, places)
        deltas[name] = u._replace(name=name, dtype="F32", shape=shape, size_bytes=0)
    return factors, deltas


def _require_fit(
    places: Sequence[Place], shape: Sequence[int], u: TensorInfo, v: TensorInfo
) -> None:
    """Refuse places that are not all of the tensor, or factors of other shapes."""
    rows, cols = prod(shape[:-1]), shape[-1]
    inside = all(p.cols[1] <= cols and all(b <= rows for _, b in p.rows) for p in places)
    if not inside or sum(p.height * p.width for p in places) != rows * cols:
        raise ValueError(f"its matrices are not all of {tuple(shape)}")
    expected = factor_shapes(places, u.shape[1])
    if (u.shape, v.shape) != expected or u.dtype != v.dtype:
        raise ValueError(f"they are {u.shape} and {v.shape}; expected {expected[0]}, {expected[1]}")
