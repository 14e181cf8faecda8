"""Embedding and head, and others with a row per token: pair their rows by token, or refuse."""

from array import array
from collections.abc import Callable, Sequence

from drift_merge.errors import AlignmentError
from drift_merge.names.modules import ModuleSelection
from drift_merge.names.pairing import DraftRecord, TowerSide
from drift_merge.names.tables import in_order, table_of
from drift_merge.names.tensors import Part, RowMap, Shape, identity_parts
from drift_merge.names.vocabulary import Vocabulary, match_rows, row_map

BothVocabularies = tuple[Vocabulary, Vocabulary]
VocabularySource = BothVocabularies | Callable[[], BothVocabularies] | None


def pair_rows(
    drafts: Sequence[DraftRecord],
    selection: ModuleSelection,
    ours: TowerSide,
    theirs: TowerSide,
    vocabularies: VocabularySource,
) -> tuple[list[DraftRecord], dict[str, RowMap], BothVocabularies | None]:
    """Return the drafts with rows matched by token, the rows of each tensor, and what was read.

    The pieces of one table become one draft. Lines that are not selected, or of another width,
    are not matched by token.

    Raises:
        AlignmentError: if such a tensor is selected on both sides without vocabularies, or its
            pieces have no known order.
    """
    joined = _join_pieces(drafts, ours, theirs)
    wanted = [draft for draft in joined if _has_rows(draft, selection, ours, theirs)]
    if not wanted:
        return joined, {}, None
    both = vocabularies() if callable(vocabularies) else vocabularies
    if both is None:
        raise _unreadable([draft.name for draft in wanted], ours, theirs)
    row_maps: dict[str, RowMap] = {}
    views: dict[str, tuple[tuple[Part, ...], ...]] = {}
    by_size: dict[tuple[int, int], RowMap] = {}
    for draft in wanted:
        tables = _Table(draft.reasoner, ours, both[0]), _Table(draft.mllm, theirs, both[1])
        size = (tables[0].num_rows, tables[1].num_rows)
        if size not in by_size:
            by_size[size] = match_rows(*both, reasoner_rows=size[0], mllm_rows=size[1])
        views[draft.name] = _place(by_size[size], *tables, row_maps, both[1])
    return [_by_token(draft, views) for draft in joined], row_maps, both


class _Table:
    """The pieces of one table of one side, in the order of their ids."""

    def __init__(self, names: Sequence[str], side: TowerSide, vocabulary: Vocabulary) -> None:
        ordered = in_order(names)
        if ordered is None:
            raise AlignmentError(
                f"{side.model.label}: nothing says in which order the rows of"
                f" {' and '.join(side.stored[name] for name in sorted(names))} follow.",
                remedy="Leave them out, e.g. --modules attn,mlp,norm",
            )
        self.side, self.names, self.num_rows = side, ordered, 0
        self.ranges: dict[str, tuple[int, int]] = {}
        for name in ordered:
            shape = side.shapes[name]
            rows = shape[0] if shape else max(vocabulary.values(), default=-1) + 1
            self.ranges[name] = (self.num_rows, self.num_rows + rows)
            self.num_rows += rows

    def holder(self, rows: Sequence[int]) -> str | None:
        """The one piece that holds all rows that are given; None if there are several."""
        present = [row for row in rows if row >= 0]
        if len(self.names) == 1 or not present:
            return self.names[0]
        first, last = min(present), max(present)
        found = (n for n, (begin, end) in self.ranges.items() if begin <= first and last < end)
        return next(found, None)


def _place(
    whole: RowMap,
    ours: _Table,
    theirs: _Table,
    row_maps: dict[str, RowMap],
    vocabulary: Vocabulary,
) -> tuple[tuple[Part, ...], ...]:
    """Say of each piece of the mllm which rows of which pieces of the reasoner it takes."""
    explained = set(vocabulary.values())
    views = []
    for name, (begin, end) in theirs.ranges.items():
        rows = array("q", whole.rows[begin:end])
        holder = ours.holder(rows)
        pieces = ours.names if holder is None else (holder,)
        first, last = ours.ranges[pieces[0]][0], ours.ranges[pieces[-1]][1]
        if first:
            rows = array("q", (row - first if row >= 0 else -1 for row in rows))
        row_maps[name] = row_map(
            rows,
            num_unexplained=sum(row not in explained for row in range(begin, end)),
            reasoner_rows=last - first if holder else -1,
        )
        shape, stored = theirs.side.shapes[name], ours.side.stored
        shapes = {piece: ours.side.shapes[piece] for piece in pieces}
        parts: tuple[Part, ...] = ()
        if holder and shape and shapes[holder]:
            parts = identity_parts(stored[holder], shape)
        elif not holder and shape:
            parts = tuple(p for n, s in shapes.items() for p in identity_parts(stored[n], s or ()))
        views.append(parts)
    return tuple(views)


def _join_pieces(
    drafts: Sequence[DraftRecord], ours: TowerSide, theirs: TowerSide
) -> list[DraftRecord]:
    """Make one draft of a table that a side stores in pieces, or under another last word."""
    of_table: dict[str, list[DraftRecord]] = {}
    for draft in drafts:
        table = table_of(draft.name)
        if table is not None:
            of_table.setdefault(table, []).append(draft)
    gone: set[str] = set()
    joined = []
    for found in of_table.values():
        names = (
            tuple(name for draft in found for name in draft.reasoner),
            tuple(name for draft in found for name in draft.mllm),
        )
        if len(found) == 1 or not all(names):
            continue
        gone.update(draft.name for draft in found)
        # Named after the side that stores it whole.
        name = min(names, key=len)[0]
        one, other = (in_order(some) or some for some in names)
        status = "matched" if _has_one_width(one, other, ours, theirs) else "shape_mismatch"
        joined.append(DraftRecord(name, one, other, status, tuple(() for _ in other)))
    return [draft for draft in drafts if draft.name not in gone] + joined


def _has_one_width(
    one: Sequence[str], other: Sequence[str], ours: TowerSide, theirs: TowerSide
) -> bool:
    widths = {_width(ours, name) for name in one} | {_width(theirs, name) for name in other}
    return len(widths - {None}) <= 1


def _width(side: TowerSide, name: str) -> Shape | None:
    shape = side.shapes[name]
    return None if shape is None else shape[1:]


def _has_rows(
    draft: DraftRecord, selection: ModuleSelection, ours: TowerSide, theirs: TowerSide
) -> bool:
    if not (draft.reasoner and draft.mllm) or table_of(draft.name) is None:
        return False
    is_taken = any(selection.takes(name) for name in draft.mllm)
    return is_taken and _has_one_width(draft.reasoner, draft.mllm, ours, theirs)


def _by_token(draft: DraftRecord, views: dict[str, tuple[tuple[Part, ...], ...]]) -> DraftRecord:
    if draft.name not in views:
        return draft
    return draft._replace(status="matched", views=views[draft.name])


def _unreadable(names: list[str], ours: TowerSide, theirs: TowerSide) -> AlignmentError:
    return AlignmentError(
        f"{' and '.join(sorted(names))} cannot be matched without both vocabularies: equal row"
        f" numbers may stand for different tokens in {ours.model.label} and"
        f" {theirs.model.label}.",
        remedy="Put the tokenizer.json of both beside their weights and run: pip install"
        " 'drift_merge[tokenizers]'\nOr leave embed and head out, e.g. --modules attn,mlp,norm",
    )
