"""Which parameter in memory is which tensor of the prior. In this order, the surest first:

the user's map; the model's own conversion of disk names (transformers); canonical names, as the
alignment of two checkpoints uses them; and of what is left, equal shapes and recorded values.
"""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import prod

from torch import nn

from drift_merge.errors import AlignmentError, RecipeError
from drift_merge.names.layouts import strip_wrappers
from drift_merge.names.modules import layer_of
from drift_merge.names.name_map import SideMap
from drift_merge.names.naming import Tower
from drift_merge.names.pairing import DraftRecord, TowerSide, pair_up, tower_side
from drift_merge.names.tensors import Part, identity_parts
from drift_merge.names.towers import find_towers, tower_score
from drift_merge.storage.measured import TensorRecord
from drift_merge.training.match.conversions import convert
from drift_merge.training.match.live import LABEL, LiveModel
from drift_merge.training.match.samples import count_alike, find_partners

_SEEN = 16  # tensors of a tower that are compared with the prior, where there are two towers


@dataclass(frozen=True, slots=True)
class Place:
    """A tensor in memory and the parts of it that the prior's tensors fill."""

    name: str  # canonical
    stored: str  # in memory
    parts: tuple[Part, ...]  # `name` is that of the prior's tensor


@dataclass(frozen=True, slots=True)
class Line:
    """One line of the account: a tensor, or a group that one side fuses."""

    status: str  # matched | shape_mismatch | only_reasoner (the prior's) | only_mllm (in memory)
    prior: tuple[str, ...]  # canonical names
    places: tuple[Place, ...]
    is_converted: bool = False  # by the model's own conversion: the prior's names are what counts

    @property
    def names(self) -> tuple[str, ...]:
        """The canonical names that modules and layers select."""
        of_places = tuple(place.name for place in self.places)
        return self.prior if self.is_converted or not of_places else of_places


@dataclass(frozen=True, slots=True)
class Hints:
    """What helps to tell names in memory: all of it optional."""

    entries: Mapping[str, TensorRecord] = field(
        default_factory=dict
    )  # the manifest's, by canonical name
    name_map: SideMap = field(default_factory=SideMap)  # the mllm's side of a `--map` file
    tower: str | None = None  # prefix in memory of the tower to train
    by_value: Mapping[str, str] = field(default_factory=dict)  # pairs of the run that goes on
    computed: tuple[str, str | None] | None = (
        None  # modules and layers that the prior was asked for
    )


@dataclass(frozen=True, slots=True)
class Paired:
    """Every tensor of the prior and of the tower in memory, once."""

    lines: tuple[Line, ...]
    num_layers: int
    by_value: Mapping[str, str]  # canonical name -> name in memory, of pairs that values made


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
    theirs = _find_tower(live, ours, replace(hints, name_map=name_map), converted)
    lines = [_name(line, theirs) for line in converted]
    is_prior = {name for line in lines for name in line.prior}
    is_placed = {place.stored for line in lines for place in line.places}
    left = _without(ours, is_prior, set()), _without(theirs, set(), is_placed)
    lines += [_line(draft, theirs) for draft in pair_up(*left)[0]]
    lines, by_value = _pair_leftovers(lines, live, hints)
    return Paired(tuple(lines), (theirs if theirs.stored else ours).tower.num_layers, by_value)


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
        parts = tuple(replace(part, name=stored[part.name]) for part in found.parts)
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


def _find_tower(live: LiveModel, ours: TowerSide, hints: Hints, converted: list[Line]) -> TowerSide:
    """The tower in memory: as the user says, where the conversion leads, or as structure says."""
    model = live.model()
    for root in dict.fromkeys((hints.tower, hints.name_map.tower, _root_of(converted))):
        if root is None:
            continue
        try:
            (tower,) = find_towers(model, name_map=SideMap(root, hints.name_map.rules))
            return tower_side(model, tower)
        except AlignmentError as error:
            if root == hints.tower:
                others = _find_tower(live, ours, replace(hints, tower=None), converted).tower
                raise AlignmentError(
                    error.message, remedy=_call(others.root or "layers")
                ) from error
    try:
        towers = find_towers(model, name_map=SideMap(None, hints.name_map.rules))
    except AlignmentError as error:
        if converted:
            return tower_side(model, Tower("", {}, frozenset(), (), tuple(live.shapes), 0))
        raise _for_attach(error) from error
    return tower_side(model, _choose(towers, live, ours, hints))


def _root_of(converted: list[Line]) -> str | None:
    """Where most of the layers are that the conversion has found: `model.language_model.layers`."""
    roots: Counter[str] = Counter()
    for line in converted:
        number = layer_of(line.prior[0])
        if number is not None:
            root, found, _ = strip_wrappers(line.places[0].stored).partition(f".{number}.")
            roots[root] += bool(found)
    return max(roots, key=lambda root: roots[root], default=None)


def _choose(towers: list[Tower], live: LiveModel, ours: TowerSide, hints: Hints) -> Tower:
    """The tower whose names and shapes agree best with the prior's, then the one of its values."""
    if len(towers) == 1:
        return towers[0]
    model = live.model()
    scores = []
    for tower in towers:
        agreement, *rest = tower_score(model, tower, ours.shapes)
        scores.append((agreement, _alike(tower, live, hints), *rest))
    best = [t for t, score in zip(towers, scores, strict=True) if score == max(scores)]
    if len(best) > 1 and len({_first_tensor(tower, live) for tower in best}) > 1:
        raise AlignmentError(
            f"{LABEL} has {len(best)} language towers that neither shapes nor values tell apart: "
            + ", ".join(f"{tower.root}layers" for tower in best)
            + ".",
            remedy=_call(best[0].root),
        )
    return best[0]


def _alike(tower: Tower, live: LiveModel, hints: Hints) -> int:
    both = (
        (hints.entries[canonical], live.tensor(stored))
        for stored, canonical in tower.canonical.items()
        if canonical in hints.entries
    )
    return count_alike([pair for pair, _ in zip(both, range(_SEEN), strict=False)])


def _first_tensor(tower: Tower, live: LiveModel) -> int:
    """Which tensor the first of a tower is: that of another tower too, if they are tied."""
    return id(live.tensor(min(n for n, c in tower.canonical.items() if c.startswith("layers."))))


def _call(root: str) -> str:
    return f'Say which is the language tower: attach(..., tower="{root.rstrip(".")}")'


def _for_attach(error: AlignmentError) -> AlignmentError:
    """The words of a command line as those of attach()."""
    remedy = error.remedy
    if found := re.search(r"\n\w+:\n  tower: (\S+)", remedy):
        remedy = _call(found[1])
    remedy = remedy.replace("Pass a file with --map.", "Pass a file: attach(..., map_file=FILE).")
    return AlignmentError(error.message, remedy=remedy)


def _pair_leftovers(
    lines: list[Line], live: LiveModel, hints: Hints
) -> tuple[list[Line], dict[str, str]]:
    """Pair what names have left on both sides, layer by layer, by the values recorded."""
    ours = {line.prior[0]: line for line in lines if line.status == "only_reasoner"}
    theirs = {line.places[0].stored: line for line in lines if line.status == "only_mllm"}
    found: dict[str, str] = {}
    for layer in {layer_of(name) for name in ours}:
        entries = {n: hints.entries[n] for n in ours if layer_of(n) == layer and n in hints.entries}
        here = [n for n, line in theirs.items() if layer_of(line.places[0].name) == layer]
        if hints.by_value:
            pairs = {n: hints.by_value[n] for n in entries if hints.by_value.get(n) in here}
        else:
            pairs = find_partners(entries, {name: live.tensor(name) for name in here})
        found |= pairs
    gone = [*map(ours.get, found), *map(theirs.get, found.values())]
    kept = [line for line in lines if not any(line is one for one in gone)]
    for name, stored in found.items():
        canonical = theirs[stored].places[0].name
        parts = identity_parts(name, live.shapes[stored])
        kept.append(Line("matched", (name,), (Place(canonical, stored, parts),), True))
    return kept, found
