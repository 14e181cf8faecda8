"""The account of an alignment: one record for every stored tensor of both models."""

from collections.abc import Iterator, Mapping, Sequence

from drift_merge.names.layers.promises import empty_words, left_out
from drift_merge.names.lineage import is_tied
from drift_merge.names.modules import ModuleSelection, canonical_order, classify, layer_of
from drift_merge.names.pairing import DraftRecord, TowerSide
from drift_merge.names.second_names import (
    EMBEDDING,
    HEAD,
    SecondNames,
    is_listed_only,
)
from drift_merge.names.tensors import (
    Alignment,
    Finding,
    Model,
    Pair,
    Part,
    Record,
    RowMap,
    Shape,
    Side,
)
from drift_merge.names.towers import hidden_size

_MAX_EXAMPLES = 3


def take_account(
    drafts: Sequence[DraftRecord],
    selection: ModuleSelection,
    ours: TowerSide,
    theirs: TowerSide,
    *,
    findings: Sequence[Finding],
    row_maps: Mapping[str, RowMap],
    second: SecondNames,
) -> Alignment:
    """Turn what is paired and what is selected into an `Alignment`.

    A group is selected if one of the mllm's names in it is (the reasoner's, where the mllm
    has none). Embed and head of `row_maps` count as matched however many rows are.
    """
    aliases = _aliases(ours, theirs)
    pairs: list[Pair] = []
    records: list[Record] = []
    examples: list[tuple[str, str, str]] = []
    selected: set[str] = set()
    unselected: list[str] = []
    for draft in sorted(drafts, key=lambda draft: canonical_order(draft.name)):
        taken = [
            name not in aliases and selection.takes(name) for name in draft.mllm or draft.reasoner
        ]
        is_taken = any(taken) and draft.status != "not_selected"
        if is_taken:
            selected.update(draft.mllm or draft.reasoner)
        elif draft.status == "matched":
            unselected.append(draft.name)
        status = draft.status if is_taken else "not_selected"
        records.append(_record(draft, status, ours, theirs, second))
        if is_taken and draft.status == "matched":
            chosen = zip(draft.mllm, draft.views, taken, strict=True)
            pairs += [_pair(name, parts, theirs) for name, parts, use in chosen if use]
        elif is_taken and len(examples) < _MAX_EXAMPLES:
            examples.append(_example(draft, ours, theirs))
    num_selected = sum(record.status != "not_selected" for record in records)
    records += _unselectable(ours, theirs, drafts, second)
    return Alignment(
        pairs=tuple(pairs),
        records=tuple(records),
        findings=(
            *findings,
            *empty_words(selection, selected),
            *left_out(unselected, selection),
            *_head_findings(selection, ours, theirs, second),
            *_row_findings(row_maps),
        ),
        num_selected=num_selected,
        num_matched=sum(record.status == "matched" for record in records),
        rows=row_maps,
        second_names=second.of,
        alike=second.alike,
        copies_apart=second.apart,
        reasoner=_side(ours),
        mllm=_side(theirs),
        examples=tuple(examples),
    )


def _record(
    draft: DraftRecord, status: str, ours: TowerSide, theirs: TowerSide, second: SecondNames
) -> Record:
    # The fused tensor's shape for a group, whoever stores it.
    shape = theirs.shapes.get(draft.name) or ours.shapes.get(draft.name)
    stored = _stored(theirs.stored, draft.mllm)
    again = [other for name in stored for other in second.of.get(name, ())] if second.of else ()
    mine = _stored(ours.stored, draft.reasoner)
    return Record(draft.name, mine, stored, shape, status, tuple(again))


def _stored(stored: Mapping[str, str], names: tuple[str, ...]) -> tuple[str, ...]:
    # Nearly all records have one name a side; a generator for it costs three times as much.
    return (stored[names[0]],) if len(names) == 1 else tuple([stored[name] for name in names])


def _pair(name: str, parts: tuple[Part, ...], theirs: TowerSide) -> Pair:
    shape = theirs.shapes[name] or ()
    return Pair(name, theirs.stored[name], shape, parts, classify(name), layer_of(name))


def _example(draft: DraftRecord, ours: TowerSide, theirs: TowerSide) -> tuple[str, str, str]:
    return (
        draft.name,
        _show([ours.shapes[name] for name in draft.reasoner]),
        _show([theirs.shapes[name] for name in draft.mllm]),
    )


def _show(shapes: list[Shape | None]) -> str:
    if not shapes:
        return "none"
    texts = ["unknown" if shape is None else str(shape) for shape in shapes]
    more = f" and {len(texts) - 3} more" if len(texts) > 3 else ""
    return " + ".join(texts[:3]) + more


def _unselectable(
    ours: TowerSide, theirs: TowerSide, drafts: Sequence[DraftRecord], second: SecondNames
) -> Iterator[Record]:
    """Yield the records of buffers, of what one side alone has, then of everything outside."""
    one, other = (
        {side.tower.canonical[name]: name for name in side.tower.buffers} for side in (ours, theirs)
    )
    for canonical in sorted({*one, *other}, key=canonical_order):
        a, b = one.get(canonical), other.get(canonical)
        shape = theirs.model.shapes[b] if b else ours.model.shapes[a or ""]
        yield Record(canonical, (a,) if a else (), (b,) if b else (), shape, "not_selected")
    mine = {name for draft in drafts for name in draft.reasoner}
    for name in sorted(ours.stored.keys() - mine, key=canonical_order):
        yield _outside(ours.stored[name], ours.model, is_mllm=False)
    its = {name for draft in drafts for name in draft.mllm}
    for name in sorted(theirs.stored.keys() - its, key=canonical_order):
        stored = theirs.stored[name]
        if name in theirs.tower.extras:
            yield _outside(stored, theirs.model, is_mllm=True)
        else:
            yield Record(name, (), (stored,), theirs.model.shapes[stored], "not_selected")
    for name in ours.tower.outside:
        yield _outside(name, ours.model, is_mllm=False)
    again = {name for names in second.of.values() for name in names}
    for name in theirs.tower.outside:
        if name not in again:
            yield _outside(name, theirs.model, is_mllm=True)


def _outside(name: str, model: Model, *, is_mllm: bool) -> Record:
    mine, its = ((), (name,)) if is_mllm else ((name,), ())
    return Record(name, mine, its, model.shapes[name], "outside_tower")


def _aliases(ours: TowerSide, theirs: TowerSide) -> set[str]:
    """Return heads that are only listed: they are the embedding, stored once more."""
    return {
        name
        for side, other in ((ours, theirs), (theirs, ours))
        for name in side.stored
        if name not in other.stored and is_listed_only(name, side)
    }


def _head_findings(
    selection: ModuleSelection, ours: TowerSide, theirs: TowerSide, second: SecondNames
) -> list[Finding]:
    if not selection.takes(HEAD) or (HEAD in ours.stored and HEAD in theirs.stored):
        return []
    remedy = "Leave head out of --modules; embed covers a head that is the embedding."
    again = second.of.get(theirs.stored.get(EMBEDDING, ""), ())
    if any(theirs.tower.canonical.get(name) == HEAD for name in again):
        message = "The mllm's head is its embedding, stored under both names (tied)."
        return [Finding("tied_head", "info", message, remedy)]
    if HEAD not in ours.stored and HEAD not in theirs.stored:
        if is_tied(ours.model.config) is False or is_tied(theirs.model.config) is False:
            message = (
                "No head was found in either model, though a config says that it is not the"
                " embedding (tie_word_embeddings is false): it is left as it is."
            )
            remedy = 'Name it in a file given with --map, e.g. "transformer.out.weight":'
            remedy += ' "lm_head.weight" for both sides.'
            return [Finding("no_head", "warning", message, remedy)]
        message = "Neither model stores a head: it is the embedding (tied)."
        return [Finding("tied_head", "info", message, remedy)]
    who, whose = ("reasoner", "mllm") if HEAD in theirs.stored else ("mllm", "reasoner")
    message = f"The {who} stores no head (it is the embedding), the {whose} does."
    return [Finding("tied_head", "warning", message, remedy)]


def _row_findings(row_maps: Mapping[str, RowMap]) -> list[Finding]:
    findings = []
    for name, rows in row_maps.items():
        if not rows.num_unmatched:
            continue
        total = rows.num_matched + rows.num_unmatched
        unknown = rows.num_unexplained
        why = f" ({unknown:,} of these no tokenizer file explains)" if unknown else ""
        message = (
            f"{name}: {rows.num_matched:,} of {total:,} rows have a partner with the same token;"
            f" {rows.num_unmatched:,} stay as the mllm has them{why}."
        )
        severity = "warning" if rows.num_matched < rows.num_unmatched else "info"
        remedy = "Nothing to do if the mllm added tokens; otherwise leave embed and head out."
        findings.append(Finding("rows_unmatched", severity, message, remedy))
    return findings


def _side(side: TowerSide) -> Side:
    tower = side.tower
    return Side(side.model.label, tower.root, tower.num_layers, hidden_size(side.model, tower))
