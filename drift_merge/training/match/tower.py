"""Finds the language tower of a live model, where a prior leads to one of several."""

from collections import Counter
from dataclasses import replace

from drift_merge.errors import AlignmentError
from drift_merge.names.layouts import strip_wrappers
from drift_merge.names.modules import layer_of
from drift_merge.names.name_map import SideMap
from drift_merge.names.naming import Tower
from drift_merge.names.pairing import TowerSide, tower_side
from drift_merge.names.towers import find_towers, likely_lists, tower_score
from drift_merge.training.match.lines import Hints, Line
from drift_merge.training.match.live import LABEL, LiveModel
from drift_merge.training.match.samples import count_alike

_SEEN = 16  # tensors of a tower that are compared with the prior, where there are two towers


def find_tower(live: LiveModel, ours: TowerSide, hints: Hints, converted: list[Line]) -> TowerSide:
    """Find the tower in memory: as the user says, where the conversion leads, or by structure.

    Args:
        live: the model.
        ours: the prior.
        hints: of the manifest and of the user; its map has rules for memory only.
        converted: what the model's own conversion has placed.

    Raises:
        AlignmentError: there is none, or there are several that nothing tells apart.
    """
    model = live.model()
    for root in dict.fromkeys((hints.tower, hints.name_map.tower, _root_of(converted))):
        if root is None:
            continue
        try:
            (tower,) = find_towers(model, name_map=SideMap(root, hints.name_map.rules))
            return tower_side(model, tower)
        except AlignmentError as error:
            if root == hints.tower:
                others = find_tower(live, ours, replace(hints, tower=None), converted).tower
                raise AlignmentError(
                    error.message, remedy=_call(others.root or "layers")
                ) from error
    try:
        towers = find_towers(model, name_map=SideMap(None, hints.name_map.rules))
    except AlignmentError as error:
        if converted:
            return tower_side(model, Tower("", {}, frozenset(), (), tuple(live.shapes), 0))
        raise _for_attach(error, likely_lists(model)) from error
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


def _for_attach(error: AlignmentError, lists: list[str]) -> AlignmentError:
    """The words of a command line as those of attach()."""
    remedy = (
        _call(lists[0])
        if lists
        else "Give the model that the prior was computed for; or name its tensors in a file as for"
        " --map: attach(..., map_file=FILE)"
    )
    return AlignmentError(error.message, remedy=remedy)
