"""Which parameter in memory is which tensor of the prior. In this order, the surest first:

the user's map; the model's own conversion of disk names (transformers); canonical names, as the
alignment of two checkpoints uses them; and of what is left, equal shapes and recorded values.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from math import prod

from torch import nn

from drift_merge.errors import AlignmentError, RecipeError
from drift_merge.names.layouts import strip_wrappers
from drift_merge.names.modules import layer_of
from drift_merge.names.name_map import SideMap
from drift_merge.names.pairing import DraftRecord, TowerSide, pair_up
from drift_merge.names.tensors import identity_parts
from drift_merge.training.match.conversions import convert
from drift_merge.training.match.lines import Hints, Line, Paired, Place
from drift_merge.training.match.live import LABEL, LiveModel
from drift_merge.training.match.samples import find_partners
from drift_merge.training.match.tower import find_tower


def pair_live(model: nn.Module, live: LiveModel, ours: TowerSide, hints: Hints) -> Paired:
    """Pair the tensors of a prior with those of a live model.

    Args:
        model: as `attach` was given it.
        live: the same as names and shapes.
        ours: the prior.
        hints: of its manifest and of the user.

    Raises:
        AlignmentError: there is no language tower, or several that nothing tells apart.
        RecipeError: the map is of no use here.
    """
    name_map = _in_memory(hints, live)
    mapped = _mapped(name_map, live)
    converted = _convert(model, live, ours, hints, mapped)
    try:
        theirs = find_tower(live, ours, replace(hints, name_map=name_map), converted)
    except AlignmentError:
        if hints.tower is not None or not (paired := _by_value_alone(live, ours, hints)).by_value:
            raise
        return paired
    lines = [_name(line, theirs) for line in converted]
    is_prior = {name for line in lines for name in line.prior}
    is_placed = {place.stored for line in lines for place in line.places}
    left = _without(ours, is_prior, set()), _without(theirs, set(), is_placed)
    lines += [_line(draft, theirs) for draft in pair_up(*left)[0]]
    lines, by_value = _pair_leftovers(lines, live, hints)
    return Paired(tuple(lines), (theirs if theirs.stored else ours).tower.num_layers, by_value)


def _by_value_alone(live: LiveModel, ours: TowerSide, hints: Hints) -> Paired:
    """Pair a model whose structure says nothing."""
    left = [Line("only_reasoner", (name,), ()) for name in ours.stored]
    there = [Line("only_mllm", (), (Place(name, name, ()),)) for name in live.shapes]
    lines, by_value = _pair_leftovers([*left, *there], live, hints, lambda _: None)
    kept = tuple(line for line in lines if line.status != "only_mllm")
    return Paired(kept, ours.tower.num_layers, by_value)


def _in_memory(hints: Hints, live: LiveModel) -> SideMap:
    """The rules of a map that decide names in memory; others may have decided names on the disk.

    The first pattern that matches decides, as in a checkpoint.
    """
    rules = hints.name_map.rules
    if not rules:
        return hints.name_map
    stripped = [strip_wrappers(name) for name in live.shapes]
    used = {rule.pattern for name in stripped if (rule := hints.name_map.find(name))}
    stored = [str(entry.get("mllm")) for entry in hints.entries.values()]
    if not used and not any(hints.name_map.find(name) for name in stored):
        raise RecipeError(
            f"none of the {len(rules):,} patterns of the map (mllm) matches a name of {LABEL} or"
            " of the checkpoint that the prior was computed from.",
            remedy="Names in memory look like: " + ", ".join(stripped[:3]),
        )
    return SideMap(hints.name_map.tower, tuple(rule for rule in rules if rule.pattern in used))


def _mapped(name_map: SideMap, live: LiveModel) -> dict[str, str | None]:
    """Name in memory -> canonical name (None: left out), of what the map names."""
    found = ((name, strip_wrappers(name)) for name in live.shapes if name_map.rules)
    ruled = ((name, rule, s) for name, s in found if (rule := name_map.find(s)))
    return {name: rule.rename(s) for name, rule, s in ruled}


def _convert(
    model: nn.Module,
    live: LiveModel,
    ours: TowerSide,
    hints: Hints,
    mapped: Mapping[str, str | None],
) -> list[Line]:
    """Lines by the model's own conversion, of the prior's tensors that it places whole."""
    named = set(mapped.values())
    stored = {
        str(entry["mllm"]): name
        for name, entry in hints.entries.items()
        if name in ours.stored and name not in named and "mllm" in entry
    }
    shapes = {disk: ours.shapes[name] or () for disk, name in stored.items()}
    memory = {name: shape for name, shape in live.shapes.items() if name not in mapped}
    lines = []
    for found in convert(model, memory, shapes):
        parts = tuple(part._replace(name=stored[part.name]) for part in found.parts)
        names = tuple(dict.fromkeys(part.name for part in parts))
        lines.append(Line("matched", names, (Place(names[0], found.memory, parts),), True))
    return _whole_only(_grouped(lines), ours)


def _grouped(lines: list[Line]) -> list[Line]:
    """Lines that share tensors of the prior (a fused one, cut in memory) as one."""
    by_first: dict[str, Line] = {}
    for line in lines:
        known = by_first.get(line.prior[0])
        places = line.places if known is None else (*known.places, *line.places)
        names = line.prior if known is None else tuple(dict.fromkeys(known.prior + line.prior))
        by_first[line.prior[0]] = replace(line, prior=names, places=places)
    return list(by_first.values())


def _whole_only(lines: list[Line], ours: TowerSide) -> list[Line]:
    """Without lines that place a tensor of the prior in part."""
    placed: Counter[str] = Counter()
    for part in (p for line in lines for place in line.places for p in place.parts):
        placed[part.name] += part.rows * part.cols
    is_whole = {name for name, numel in placed.items() if numel == prod(ours.shapes[name] or ())}
    return [line for line in lines if is_whole.issuperset(line.prior)]


def _name(line: Line, theirs: TowerSide) -> Line:
    """With the canonical names that the tower in memory has for its places."""
    known = theirs.tower.canonical
    return replace(
        line, places=tuple(replace(p, name=known.get(p.stored, p.name)) for p in line.places)
    )


def _line(draft: DraftRecord, theirs: TowerSide) -> Line:
    views = draft.views or ((),) * len(draft.mllm)
    places = (
        Place(name, theirs.stored[name], parts)
        for name, parts in zip(draft.mllm, views, strict=True)
    )
    return Line(draft.status, draft.reasoner, tuple(places))


def _without(side: TowerSide, names: set[str], stored: set[str]) -> TowerSide:
    kept = {c: s for c, s in side.stored.items() if c not in names and s not in stored}
    return replace(side, stored=kept, shapes={name: side.shapes[name] for name in kept})


def _pair_leftovers(
    lines: list[Line],
    live: LiveModel,
    hints: Hints,
    group_of: Callable[[str], int | None] = layer_of,
) -> tuple[list[Line], dict[str, str]]:
    """Pair what names have left on both sides, layer by layer, by the values recorded."""
    ours = {line.prior[0]: line for line in lines if line.status == "only_reasoner"}
    theirs = {line.places[0].stored: line for line in lines if line.status == "only_mllm"}
    here: dict[int | None, list[str]] = {}
    for stored, line in theirs.items():
        here.setdefault(group_of(line.places[0].name), []).append(stored)
    found: dict[str, str] = {}
    for group in dict.fromkeys(map(group_of, ours)):
        names = [name for name in ours if group_of(name) == group and name in hints.entries]
        if hints.by_value:
            known = {name: hints.by_value.get(name, "") for name in names}
            pairs = {name: stored for name, stored in known.items() if stored in theirs}
        else:
            tensors = {stored: live.tensor(stored) for stored in here.get(group, ())}
            pairs = find_partners({name: hints.entries[name] for name in names}, tensors)
        found |= pairs
    gone = {id(ours[name]) for name in found} | {id(theirs[stored]) for stored in found.values()}
    kept = [line for line in lines if id(line) not in gone]
    for name, stored in found.items():
        parts = identity_parts(name, live.shapes[stored])
        place = Place(theirs[stored].places[0].name, stored, parts)
        kept.append(Line("matched", (name,), (place,), True))
    return kept, found
