"""The plain data of this floor: models as names and shapes, pairs, records, findings.

Knows nothing of tensor data; imports neither torch nor numpy. Of what a plan has 100,000, each is
a named tuple: a frozen dataclass takes three times as long to make.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any, NamedTuple

STATUSES = (
    "matched",
    "shape_mismatch",
    "only_reasoner",
    "only_mllm",
    "not_selected",
    "outside_tower",
)

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Model:
    """What this floor needs to know of a checkpoint or of a live model."""

    label: str  # what the user wrote, for messages
    shapes: Mapping[str, Shape | None]  # stored or in-memory name -> shape; None where unknown
    config: Mapping[str, Any] = field(default_factory=dict)  # config.json parsed, or {}
    copies: Mapping[str, str] | None = None
    # stored name -> one name for all tensors of equal bytes, of those that have copies; None
    # where no data was compared


class Part(NamedTuple):
    """A rectangle of a target tensor and where the reasoner stores its elements.

    The target is viewed as (rows, cols) = (prod(shape[:-1]), shape[-1]); one-dimensional
    tensors of n are (n, 1) and scalars (1, 1). Element (i, j) of the rectangle is element
    `offset + i * row_stride + j * col_stride` of the flat stored tensor.
    """

    name: str  # stored tensor of the reasoner
    row: int  # first row of the rectangle in the target
    col: int  # first column of the rectangle in the target
    rows: int
    cols: int
    offset: int  # first element, flat, in the stored tensor
    row_stride: int  # elements of the stored tensor between one target row and the next
    col_stride: int  # elements of the stored tensor between one target column and the next


class Pair(NamedTuple):
    """One tensor of the mllm's tower and the reasoner's data in its shape."""

    canonical: str  # canonical name in the mllm's layout
    mllm: str  # stored name in the mllm
    shape: Shape  # of the mllm's tensor
    parts: tuple[Part, ...]  # cover the shape exactly once; empty where shapes are unknown
    module: str  # "attn" | "mlp" | "mixer" | "norm" | "embed" | "head" | "other"
    layer: int | None  # canonical layer number


class Record(NamedTuple):
    """One line of the account; every stored tensor of both sides is in exactly one record."""

    name: str  # canonical name, or the stored name of a tensor outside the tower
    reasoner: tuple[str, ...]  # stored names, several where the mllm fuses them; may be empty
    mllm: tuple[str, ...]  # stored names, several where the reasoner fuses them; may be empty
    shape: Shape | None  # of the mllm's (first) tensor if it has one, else of the reasoner's
    status: str  # one of STATUSES
    second_names: tuple[str, ...] = ()  # stored names under which the mllm has it once more


@dataclass(frozen=True, slots=True)
class Finding:
    """Something a user should know before computing: a code, a sentence and a way out."""

    code: str  # stable word, e.g. "rope_theta"
    severity: str  # "error" | "warning" | "info"
    message: str
    remedy: str


@dataclass(frozen=True, slots=True)
class RowMap:
    """Which row of the reasoner's vocabulary belongs to each row of a tensor of the mllm's."""

    rows: Sequence[int]  # for each mllm row the reasoner's row, or -1 where it has no partner
    num_matched: int  # rows with a partner
    num_unmatched: int  # rows without: they stay as the mllm has them
    is_identity: bool  # every row is paired with its own number
    num_unexplained: int = 0  # of those without: no file of the mllm says what they stand for


@dataclass(frozen=True, slots=True)
class Side:
    """What was found of one model, for tables and messages."""

    label: str  # what the user wrote
    tower: str  # stored prefix of the language tower, "" for a bare model
    num_layers: int  # of the tower, inserted cross-attention layers not counted
    hidden_size: int | None


@dataclass(frozen=True, slots=True)
class Alignment:
    """The pairing of two models: what will be used, and an account of everything else."""

    pairs: tuple[Pair, ...]  # matched and selected, in the order embed, layers, norm, head
    records: tuple[Record, ...]  # the tower in the same order, then what is outside it
    findings: tuple[Finding, ...]
    num_selected: int  # records selected by modules and layers, matched or not
    num_matched: int  # records of status "matched"
    rows: Mapping[str, RowMap]
    # canonical name of each selected tensor with a row per token -> which rows; row r of such a
    # pair is row `rows[r]` of its parts one after the other (whole stored tensors: the pieces of
    # a table), or absent where that is -1. Where the map is the identity, the part says it all
    second_names: Mapping[str, tuple[str, ...]]
    # stored name in the mllm's tower -> other stored names of the same parameter
    alike: Mapping[str, str]
    # canonical name -> that of an earlier layer with equal bytes in both models: random masks
    # are the earlier one's
    copies_apart: frozenset[str]  # stored names of equal bytes that are parameters of their own
    reasoner: Side
    mllm: Side
    examples: tuple[tuple[str, str, str], ...]
    # up to 3 selected records that are not matched: name, reasoner's shape, mllm's shape, as text
    offer: str = ""  # a map file's text with which all that is selected is matched; "": none known


def matrix_shape(shape: Sequence[int]) -> tuple[int, int]:
    """Return (rows, cols) of a tensor seen as a matrix; the one convention of all rooms.

    A row is a vector along the last dimension. A tensor of one dimension has a row per element:
    a bias is cut and fused along the rows of its weight.

    >>> matrix_shape((4, 3, 2)), matrix_shape((5,)), matrix_shape(())
    ((12, 2), (5, 1), (1, 1))
    """
    if len(shape) < 2:
        return prod(shape), 1
    return prod(shape[:-1]), shape[-1]


def identity_parts(name: str, shape: Shape) -> tuple[Part, ...]:
    """Return the single part that takes stored tensor `name` as it is."""
    rows, cols = matrix_shape(shape)
    return (Part(name, 0, 0, rows, cols, 0, cols, 1),)


def is_identity(parts: Sequence[Part], shape: Shape) -> bool:
    """Whether parts are one stored tensor, taken as it is."""
    rows, cols = matrix_shape(shape)
    return len(parts) == 1 and parts[0][1:] == (0, 0, rows, cols, 0, cols, 1)
