"""Embedding and head: pair their rows by token, or refuse."""

from collections.abc import Sequence
from dataclasses import replace

from drift_merge.errors import AlignmentError
from drift_merge.names.modules import ModuleSelection
from drift_merge.names.pairing import DraftRecord, TowerSide
from drift_merge.names.tensors import RowMap, Shape, identity_parts
from drift_merge.names.vocabulary import Vocabulary, match_rows


def pair_rows(
    drafts: Sequence[DraftRecord],
    selection: ModuleSelection,
    ours: TowerSide,
    theirs: TowerSide,
    vocabularies: tuple[Vocabulary, Vocabulary] | None,
) -> tuple[list[DraftRecord], dict[str, RowMap]]:
    """Return the drafts with embed and head matched by token, and the rows of each.

    Drafts that are not selected, or of another width, stay as they are. A model aligned with
    itself needs no vocabularies.

    Raises:
        AlignmentError: if embed or head is selected on both sides without vocabularies.
    """
    wanted = [draft.name for draft in drafts if _has_rows(draft, selection, ours, theirs)]
    if not wanted or _is_same(ours, theirs):
        return list(drafts), {}
    if vocabularies is None:
        raise AlignmentError(
            f"{' and '.join(sorted(wanted))} cannot be matched without both vocabularies: equal row"
            f" numbers may stand for different tokens in {ours.model.label} and"
            f" {theirs.model.label}.",
            remedy="Put the tokenizer.json of both beside their weights and run: pip install"
            " 'drift_merge[tokenizers]'\nOr leave embed and head out, e.g. --modules attn,mlp,norm",
        )
    row_maps: dict[str, RowMap] = {}
    by_size: dict[tuple[int, int], RowMap] = {}
    for name in wanted:
        sizes = tuple(
            _num_rows(side.shapes[name], vocabulary)
            for side, vocabulary in zip((ours, theirs), vocabularies, strict=True)
        )
        size = (sizes[0], sizes[1])
        if size not in by_size:
            by_size[size] = match_rows(*vocabularies, reasoner_rows=size[0], mllm_rows=size[1])
        row_maps[name] = by_size[size]
    return [_by_token(draft, row_maps, ours, theirs) for draft in drafts], row_maps


def _has_rows(
    draft: DraftRecord, selection: ModuleSelection, ours: TowerSide, theirs: TowerSide
) -> bool:
    if not draft.name.startswith(("embed_tokens.", "lm_head.")):
        return False
    if not (draft.reasoner and draft.mllm):
        return False
    one, other = ours.shapes[draft.name], theirs.shapes[draft.name]
    has_one_width = one is None or other is None or one[1:] == other[1:]
    return has_one_width and selection.takes(draft.name)


def _is_same(ours: TowerSide, theirs: TowerSide) -> bool:
    one, other = ours.model, theirs.model
    return one is other or (one.label == other.label and one.shapes == other.shapes)


def _num_rows(shape: Shape | None, vocabulary: Vocabulary) -> int:
    return shape[0] if shape else max(vocabulary.values(), default=-1) + 1


def _by_token(
    draft: DraftRecord, row_maps: dict[str, RowMap], ours: TowerSide, theirs: TowerSide
) -> DraftRecord:
    if draft.name not in row_maps:
        return draft
    shape = theirs.shapes[draft.name]
    is_known = shape is not None and ours.shapes[draft.name] is not None
    parts = identity_parts(ours.stored[draft.name], shape) if shape and is_known else ()
    return replace(draft, status="matched", views=(parts,))
