"""The account of an alignment: one record for every stored tensor of both models."""

import re
from collections.abc import Iterator, Mapping, Sequence

from drift_merge.names.lineage import is_tied
from drift_merge.names.modules import ModuleSelection, classify, layer_of
from drift_merge.names.pairing import DraftRecord, TowerSide
from drift_merge.names.tensors import Alignment, Finding, Pair, Part, Record, RowMap, Shape, Side
from drift_merge.names.towers import hidden_size

_NUMBER = re.compile(r"\d+")
_RANKS = {"embed_tokens": 0, "layers": 1, "norm": 2, "lm_head": 3}
_MAX_EXAMPLES = 3


def take_account(
    drafts: Sequence[DraftRecord],
    selection: ModuleSelection,
    ours: TowerSide,
    theirs: TowerSide,
    *,
    findings: Sequence[Finding],
    row_maps: Mapping[str, RowMap],
) -> Alignment:
    """Turn what is paired and what is selected into an `Alignment`.

    A group is selected if one of the mllm's names in it is (the reasoner's, where the mllm
    has none). Embed and head of `row_maps` count as matched however many rows are.
    """
    aliases = _aliases(ours, theirs)
    pairs: list[Pair] = []
    records: list[Record] = []
    examples: list[tuple[str, str, str]] = []
    for draft in sorted(drafts, key=lambda draft: _order(draft.name)):
        taken = [
            name not in aliases and selection.takes(name) for name in draft.mllm or draft.reasoner
        ]
        is_taken = any(taken)
        records.append(_record(draft, draft.status if is_taken else "not_selected", ours, theirs))
        if is_taken and draft.status == "matched":
            chosen = zip(draft.mllm, draft.views, taken, strict=True)
            pairs += [_pair(name, parts, theirs) for name, parts, use in chosen if use]
        elif is_taken and len(examples) < _MAX_EXAMPLES:
            examples.append(_example(draft, ours, theirs))
    num_selected = sum(record.status != "not_selected" for record in records)
    records += _unselectable(ours, theirs)
    return Alignment(
        pairs=tuple(pairs),
        records=tuple(records),
        findings=(*findings, *_head_findings(selection, ours, theirs), *_row_findings(row_maps)),
        num_selected=num_selected,
        num_matched=sum(record.status == "matched" for record in records),
        vocabulary={name: rows for name, rows in row_maps.items() if not rows.is_identity},
        reasoner=_side(ours),
        mllm=_side(theirs),
        examples=tuple(examples),
    )


def _order(canonical: str) -> tuple[int, int, str]:
    """Sort as a model runs: embedding, layers by number, final norm, head."""
    rank = _RANKS.get(canonical.partition(".")[0], 4)
    tail = canonical
    if ".experts." in tail:  # expert 10 comes after expert 9
        tail = _NUMBER.sub(lambda number: number[0].zfill(6), tail)
    return rank, layer_of(canonical) or 0, tail


def _record(draft: DraftRecord, status: str, ours: TowerSide, theirs: TowerSide) -> Record:
    # The fused tensor's shape for a group, whoever stores it.
    shape = theirs.shapes.get(draft.name) or ours.shapes.get(draft.name)
    return Record(
        draft.name,
        _stored(ours.stored, draft.reasoner),
        _stored(theirs.stored, draft.mllm),
        shape,
        status,
    )


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


def _unselectable(ours: TowerSide, theirs: TowerSide) -> Iterator[Record]:
    """Yield the records of buffers, then of everything outside the towers."""
    one, other = (
        {side.tower.canonical[name]: name for name in side.tower.buffers} for side in (ours, theirs)
    )
    for canonical in sorted({*one, *other}, key=_order):
        mine, its = one.get(canonical), other.get(canonical)
        shape = theirs.model.shapes[its] if its else ours.model.shapes[mine or ""]
        yield Record(
            canonical, (mine,) if mine else (), (its,) if its else (), shape, "not_selected"
        )
    for name in ours.tower.outside:
        yield Record(name, (name,), (), ours.model.shapes[name], "outside_tower")
    for name in theirs.tower.outside:
        yield Record(name, (), (name,), theirs.model.shapes[name], "outside_tower")


def _aliases(ours: TowerSide, theirs: TowerSide) -> set[str]:
    """Return heads that are only listed: their own config says they are the embedding."""
    return {
        name
        for side, other in ((ours, theirs), (theirs, ours))
        for name in side.stored
        if name.startswith("lm_head.") and name not in other.stored and is_tied(side.model.config)
    }


def _head_findings(selection: ModuleSelection, ours: TowerSide, theirs: TowerSide) -> list[Finding]:
    head = "lm_head.weight"
    if not selection.takes(head) or (head in ours.stored and head in theirs.stored):
        return []
    remedy = "Leave head out of --modules; embed covers a head that is the embedding."
    if head not in ours.stored and head not in theirs.stored:
        message = "Neither model stores a head: it is the embedding (tied)."
        return [Finding("tied_head", "info", message, remedy)]
    who, whose = ("reasoner", "mllm") if head in theirs.stored else ("mllm", "reasoner")
    message = f"The {who} stores no head (it is the embedding), the {whose} does."
    return [Finding("tied_head", "warning", message, remedy)]


def _row_findings(row_maps: Mapping[str, RowMap]) -> list[Finding]:
    findings = []
    for name, rows in row_maps.items():
        if not rows.num_unmatched:
            continue
        total = rows.num_matched + rows.num_unmatched
        message = (
            f"{name}: {rows.num_matched:,} of {total:,} rows have a partner with the same token;"
            f" {rows.num_unmatched:,} stay as the mllm has them."
        )
        severity = "warning" if rows.num_matched < rows.num_unmatched else "info"
        remedy = "Nothing to do if the mllm added tokens; otherwise leave embed and head out."
        findings.append(Finding("rows_unmatched", severity, message, remedy))
    return findings


def _side(side: TowerSide) -> Side:
    tower = side.tower
    return Side(side.model.label, tower.root, tower.num_layers, hidden_size(side.model, tower))
