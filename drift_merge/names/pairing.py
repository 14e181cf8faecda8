"""Pair the tensors of two towers: equal names, fused groups, transposed experts.

Says what is paired with what, whatever is selected; `align` turns it into an account.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from drift_merge.names import fusions
from drift_merge.names.layers.leftovers import inserted_modules, pair_renamed
from drift_merge.names.layouts import is_router_bias
from drift_merge.names.lineage import text_config
from drift_merge.names.tensors import Finding, Model, Part, Shape, identity_parts, matrix_shape
from drift_merge.names.towers import Tower, hidden_size


@dataclass(frozen=True, slots=True)
class TowerSide:
    """One model with its tower, by canonical name; buffers left out."""

    model: Model
    tower: Tower
    stored: Mapping[str, str]  # canonical name -> stored name
    shapes: Mapping[str, Shape | None]  # canonical name -> shape


class DraftRecord(NamedTuple):
    """A record in the making."""

    name: str  # canonical; of the fused tensor for a group
    reasoner: tuple[str, ...]  # canonical names
    mllm: tuple[str, ...]  # canonical names
    status: str  # matched | shape_mismatch | only_reasoner | only_mllm
    views: tuple[tuple[Part, ...], ...] = ()  # parts of each mllm name, if matched


def tower_side(model: Model, tower: Tower) -> TowerSide:
    """Return the model seen through its tower."""
    stored = {c: name for name, c in tower.canonical.items() if name not in tower.buffers}
    return TowerSide(model, tower, stored, {c: model.shapes[name] for c, name in stored.items()})


def pair_up(ours: TowerSide, theirs: TowerSide) -> tuple[list[DraftRecord], list[Finding]]:
    """Return a draft for every tensor of both towers.

    Left out are buffers, what one side alone has beside its layers, and modules that the mllm put
    into them (see `leftovers.inserted_modules`), which a finding names.
    """
    drafts = [_common(name, ours, theirs) for name in ours.stored if name in theirs.stored]
    only_ours = {name for name in ours.stored if name not in theirs.stored}
    only_theirs = {name for name in theirs.stored if name not in ours.stored}
    one, other = only_ours & ours.tower.extras, only_theirs & theirs.tower.extras
    reasons = [fusions.LAYOUT_HINT for draft in drafts if _is_undecided(draft, ours, theirs)]
    num_grouped = 0
    for fused, split in ((ours, theirs), (theirs, ours)):
        left = (only_ours, only_theirs) if fused is ours else (only_theirs, only_ours)
        for group in fusions.find_groups(*left):
            draft, reason = _grouped(group, fused, split, is_ours=fused is ours)
            drafts.append(draft)
            reasons.append(reason)
            num_grouped += draft.status == "matched"
            left[0].discard(group.fused)
            left[1].difference_update(group.splits)
    drafts += _exchanged(only_ours, only_theirs, ours, theirs)
    renamed = pair_renamed(only_ours, only_theirs, ours.shapes, theirs.shapes)
    for mine, its in renamed:
        parts = identity_parts(ours.stored[mine], theirs.shapes[its] or ())
        drafts.append(DraftRecord(its, (mine,), (its,), "matched", (parts,)))
    only_ours.difference_update(mine for mine, _ in renamed)
    only_theirs.difference_update(its for _, its in renamed)
    inserted = inserted_modules(only_theirs, ours.shapes, theirs.shapes, only_ours)
    only_theirs.difference_update(inserted)
    findings = _fusion_findings(num_grouped, reasons) + _leftover_findings(renamed, inserted)
    for names, side in ((only_ours & one, "reasoner"), (only_theirs & other, "mllm")):
        findings += _one_sided(names, side)
    only_ours -= one
    only_theirs -= other
    drafts += [DraftRecord(n, (n,), (), _alone(n, "only_reasoner")) for n in only_ours]
    drafts += [DraftRecord(n, (), (n,), _alone(n, "only_mllm")) for n in only_theirs]
    return drafts, findings


def _leftover_findings(
    renamed: list[tuple[str, str]], inserted: Mapping[str, str]
) -> list[Finding]:
    findings = []
    if renamed:
        kinds = {_tail(other): _tail(one) for one, other in renamed}
        shown = ", ".join(f"{its} is {mine}" for its, mine in sorted(kinds.items()))
        message = (
            f"{len(renamed):,} tensors have another name in the mllm, and are paired by their"
            f" place and shape: {shown}."
        )
        remedy = "Nothing to do if they are the same matrices; otherwise say so with --map."
        findings.append(Finding("renamed", "warning", message, remedy))
    if inserted:
        counts = Counter(inserted.values())
        shown = ", ".join(f"{module} ({count:,})" for module, count in sorted(counts.items()))
        message = (
            f"The mllm has {len(inserted):,} tensors in its layers of modules that the reasoner"
            f" lacks; they stay as they are: {shown}."
        )
        remedy = "Nothing to do: the mllm put them in."
        findings.append(Finding("inserted_modules", "info", message, remedy))
    return findings


def _alone(name: str, status: str) -> str:
    return "not_selected" if is_router_bias(name) else status


def _exchanged(
    only_ours: set[str], only_theirs: set[str], ours: TowerSide, theirs: TowerSide
) -> list[DraftRecord]:
    """Pair what both sides fuse, gate and up in another order; takes them from the leftovers."""
    drafts = []
    for name in sorted(only_theirs):
        mine, shape = fusions.other_order(name), theirs.shapes[name]
        if mine in only_ours and shape and shape == ours.shapes[mine] and shape[0] % 2 == 0:
            parts = fusions.exchanged_parts(ours.stored[mine], shape)
            drafts.append(DraftRecord(name, (mine,), (name,), "matched", (parts,)))
            only_ours.discard(mine)
            only_theirs.discard(name)
    return drafts


def _one_sided(names: set[str], side: str) -> list[Finding]:
    if not names:
        return []
    shown = ", ".join(sorted(names)[:3]) + (", ..." if len(names) > 3 else "")
    message = (
        f"The {side} alone has {len(names):,} tensors beside the layers of its language tower; they"
        f" are outside it: {shown}."
    )
    remedy = "Nothing to do, unless the other model has them under another name: see --map."
    return [Finding("one_sided", "info", message, remedy)]


def _tail(name: str) -> str:
    return name.split(".", 2)[2] if name.startswith("layers.") else name


def _common(name: str, ours: TowerSide, theirs: TowerSide) -> DraftRecord:
    source, target = ours.shapes[name], theirs.shapes[name]
    parts: tuple[Part, ...] | None = None
    names = (name,)
    if source is None or target is None:
        parts = ()
    elif fusions.is_fused_experts(name) and len(target) == 3 and len(source) == 3:
        parts = _experts(name, ours, theirs, source, target)
    elif source == target:
        parts = identity_parts(ours.stored[name], target)
    elif source == target[::-1] and len(target) == 2 and _have_one_width(ours, theirs, target):
        parts = fusions.transposed_parts(ours.stored[name], (1, *target))
    if parts is None and is_router_bias(name):
        return DraftRecord(name, names, names, "not_selected")
    if parts is None:
        return DraftRecord(name, names, names, "shape_mismatch")
    return DraftRecord(name, names, names, "matched", (parts,))


def _have_one_width(ours: TowerSide, theirs: TowerSide, shape: Shape) -> bool:
    """Whether a matrix of the other shape is the same one, transposed: both map the one width."""
    widths = {hidden_size(side.model, side.tower) for side in (ours, theirs)}
    return len(widths) == 1 and shape[0] != shape[1] and not widths.isdisjoint(shape)


def _experts(
    name: str, ours: TowerSide, theirs: TowerSide, source: Shape, target: Shape
) -> tuple[Part, ...] | None:
    """Both sides fuse their experts, but perhaps one of them transposes."""
    stored = ours.stored[name]
    is_square = target[1] == target[2]
    if source == target and not is_square:
        return identity_parts(stored, target)
    if source != (target[0], target[2], target[1]):
        return None
    if not is_square:
        return fusions.transposed_parts(stored, target)
    if ours.model is theirs.model:
        return identity_parts(stored, target)
    layouts = [fusions.expert_layout(name, side.shapes) for side in (ours, theirs)]
    if None in layouts:
        return None
    is_same = layouts[0] == layouts[1]
    return identity_parts(stored, target) if is_same else fusions.transposed_parts(stored, target)


def _is_undecided(draft: DraftRecord, ours: TowerSide, theirs: TowerSide) -> bool:
    if draft.status != "shape_mismatch" or not fusions.is_fused_experts(draft.name):
        return False
    return ours.shapes[draft.name] == theirs.shapes[draft.name]


def _grouped(
    group: fusions.FusedGroup, fused: TowerSide, split: TowerSide, *, is_ours: bool
) -> tuple[DraftRecord, str]:
    """Return the draft of a group and, if its shapes cannot be bridged, the reason."""
    num_kv_heads = _kv_heads(fused) or _kv_heads(split)
    slots = fusions.slots_of(group, fused.shapes, split.shapes, num_kv_heads)
    one, other = ((group.fused,), group.splits) if is_ours else (group.splits, (group.fused,))
    if isinstance(slots, str):
        return DraftRecord(group.fused, one, other, "shape_mismatch"), slots
    if not slots:
        views: tuple[tuple[Part, ...], ...] = tuple(() for _ in other)
    elif is_ours:
        cols = matrix_shape(fused.shapes[group.fused] or ())[1]
        by_name = fusions.split_parts(slots, fused.stored[group.fused], cols)
        views = tuple(by_name[name] for name in group.splits)
    else:
        views = (fusions.fused_parts(slots, split.stored),)
    return DraftRecord(group.fused, one, other, "matched", views), ""


def _kv_heads(side: TowerSide) -> int | None:
    heads = text_config(side.model.config).get("num_key_value_heads")
    return heads if isinstance(heads, int) else None


def _fusion_findings(num_grouped: int, reasons: list[str]) -> list[Finding]:
    findings = []
    if num_grouped:
        message = f"{num_grouped:,} tensors are stored fused on one side and split on the other."
        remedy = "Nothing to do: each is read as the parts of the other side's shape."
        findings.append(Finding("fused", "info", message, remedy))
    for reason in sorted(set(reasons) - {""}):
        count = reasons.count(reason)
        message = f"{count:,} fused tensors cannot be split: {reason}."
        remedy = "Complete the config.json beside the weights, or convert one model to the other's"
        findings.append(Finding("fused_layout", "error", message, remedy + " layout."))
    return findings
