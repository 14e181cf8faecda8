"""Find the language tower of a model and give its tensors canonical names.

The tower is the list of layers (`layers`, `h`, `blocks` or `layer`) whose parent, or the module
above it, also holds a token embedding; vision towers, perceivers and connectors have layers too
but no token embedding.
One rule for tensors on disk, parameters in memory and wrapped models.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from math import prod

from drift_merge.errors import AlignmentError, RecipeError
from drift_merge.names.layouts import (
    EMBEDDINGS,
    LISTS,
    is_other_sense,
    is_token_table,
    strip_wrappers,
)
from drift_merge.names.lineage import text_config
from drift_merge.names.name_map import SideMap
from drift_merge.names.naming import Tower, name_tower
from drift_merge.names.tensors import Model, Shape

__all__ = ["Tower", "agree", "canonical_names", "choose", "find_towers", "hidden_size"]

_TEXT = re.compile(r"lang|text|llm|decoder")  # only to suggest a likely list in a message
_NUMBER = re.compile(r"(?:^|\.)\d+\.")
_LIST = re.compile(rf"((?:.*?\.)?)({'|'.join(LISTS)})\.(\d+)\.")


def canonical_names(
    model: Model,
    *,
    side: str = "mllm",
    name_map: SideMap | None = None,
    like: Mapping[str, Shape | None] | None = None,
) -> Tower:
    """Find the language tower and name its tensors. The one rule for disk and memory.

    In a tower with inserted cross-attention layers (Mllama) layer i is the i-th layer that
    has self-attention, as in the text LLM it was made from; the inserted ones are outside.

    Args:
        model: names with shapes (None where unknown) and the config, {} if there is none.
        side: "reasoner" or "mllm"; the key of the map that a message speaks of.
        name_map: what `--map` says of this side.
        like: canonical names and shapes that the tower should have, e.g. those of a prior;
            decides between several towers (thinker and talker). Otherwise the config does,
            then the number of elements.

    Raises:
        AlignmentError: if there is no tower, two that cannot be told apart, or two stored
            tensors with one canonical name.
        RecipeError: if a pattern of the map matches nothing.
    """
    towers = find_towers(model, side=side, name_map=name_map)
    return choose(towers, [tower_score(model, tower, like) for tower in towers], model, side)


def find_towers(
    model: Model, *, side: str = "mllm", name_map: SideMap | None = None
) -> list[Tower]:
    """Return every language tower of the model, in the order of their prefixes.

    Errors as in `canonical_names`; there is at least one tower in the result.
    """
    side_map = name_map or SideMap()
    stripped = {name: strip_wrappers(name) for name in sorted(model.shapes)}
    mapped = _apply_rules(stripped, side_map, model, side)
    lists = _find_lists(stripped.values())
    found: list[tuple[str | None, str | None]] = [
        (_largest_list(parent, lists), root)
        for parent, root in _find_roots(stripped.values(), lists, side_map.tower)
    ]
    if not found and (side_map.tower is not None or not any(mapped.values())):
        raise _no_tower(model, side, lists, side_map.tower)
    return [
        name_tower(model, stripped, prefix, mapped=mapped, side=side, root=root)
        for prefix, root in found or [(None, None)]
    ]


def choose(towers: list[Tower], scores: list[tuple[int, ...]], model: Model, side: str) -> Tower:
    """Return the tower with the highest score.

    Raises:
        AlignmentError: if two towers share it that are not copies of each other.
    """
    best = max(scores)
    winners = [tower for tower, score in zip(towers, scores, strict=True) if score == best]
    if len(winners) == 1 or all(_is_copy(winners[0], other, model) for other in winners[1:]):
        return winners[0]
    raise AlignmentError(
        f"{model.label} has {len(winners)} language towers that nothing tells apart: "
        + ", ".join(f"{tower.root}layers (0 to {tower.num_layers - 1})" for tower in winners)
        + ".",
        remedy=f"Say which one in a file given with --map:\n{side}:\n"
        f"  tower: {winners[0].root.rstrip('.')}",
    )


def _is_copy(one: Tower, other: Tower, model: Model) -> bool:
    """Whether two towers are one that is stored twice: equal names, and bytes of the matrices."""
    copies = model.copies or {}

    def matrices(tower: Tower) -> dict[str, str | None]:
        shapes = ((c, n, model.shapes[n] or ()) for n, c in tower.canonical.items())
        return {c: copies.get(n) for c, n, shape in shapes if len(shape) > 1}

    found = matrices(one)
    return None not in found.values() and found == matrices(other)


def tower_score(
    model: Model, tower: Tower, like: Mapping[str, Shape | None] | None
) -> tuple[int, ...]:
    """Return (agreement with `like`, agreement with the config, number of elements)."""
    names = {
        canonical: model.shapes[stored]
        for stored, canonical in tower.canonical.items()
        if stored not in tower.buffers
    }
    config = text_config(model.config)
    agreement = 0 if like is None else agree(names, like)
    facts = (config.get("num_hidden_layers") == tower.num_layers) + (
        config.get("hidden_size") is not None and config["hidden_size"] == hidden_size(model, tower)
    )
    return agreement, facts, sum(prod(shape) if shape else 1 for shape in names.values())


def agree(one: Mapping[str, Shape | None], other: Mapping[str, Shape | None]) -> int:
    """Return how well two sets of named shapes agree: what is equal minus what is not."""
    equal = sum(
        1
        for name, shape in one.items()
        if name in other and (shape is None or other[name] is None or shape == other[name])
    )
    return 3 * equal - len(one) - len(other)


def hidden_size(model: Model, tower: Tower) -> int | None:
    """Return the width of the tower: of its norms where shapes are known, else the config's."""
    for stored, canonical in tower.canonical.items():
        shape = model.shapes[stored]
        if shape and canonical in ("norm.weight", "embed_tokens.weight"):
            return shape[-1]
    size = text_config(model.config).get("hidden_size")
    return size if isinstance(size, int) else None


def _apply_rules(
    stripped: Mapping[str, str], side_map: SideMap, model: Model, side: str
) -> dict[str, str | None]:
    """Return stored name -> canonical name for what the map names; None: left out."""
    mapped: dict[str, str | None] = {}
    used = set()
    for stored, name in stripped.items() if side_map.rules else ():
        rule = side_map.find(name)
        if rule is not None:
            used.add(rule.pattern)
            mapped[stored] = rule.rename(name)
    for rule in side_map.rules:
        if rule.pattern not in used:
            raise RecipeError(
                f"the map's pattern {rule.pattern!r} ({side}) matches no tensor of {model.label},"
                f" or an earlier pattern takes them all.",
                remedy="Names there look like: " + ", ".join(list(stripped.values())[:3]),
            )
    return mapped


def likely_lists(model: Model) -> list[str]:
    """Return the lists of layers of a model, those that speak of language first, then large ones.

    Those of images, sound and connectors are left out, and lists within one layer of another.
    """
    lists = _find_lists(strip_wrappers(name) for name in model.shapes)
    likely = [key for key in lists if not (is_other_sense(key[0]) or _NUMBER.search(key[0]))]
    likely.sort(key=lambda key: (not _TEXT.search(key[0]), -lists[key], key))
    return ["".join(key) for key in likely]


def _find_lists(names: Iterable[str]) -> Counter[tuple[str, str]]:
    """Count the tensors in each list of layers: (prefix of the parent, name of the list)."""
    found = (_LIST.match(name) for name in names)
    return Counter((match[1], match[2]) for match in found if match)


def _find_roots(
    names: Iterable[str], lists: Mapping[tuple[str, str], int], wanted: str | None
) -> list[tuple[str, str]]:
    """Return (parent of the list, root of the tower), which are one where nothing is between.

    The embedding stands beside the list under a name of `EMBEDDINGS`; only where no list has one
    beside it, under another name, in a module of its own, or one level further up.
    """
    parents = {parent for parent, _ in lists}
    modules = {name.rpartition(".")[0] for name in names}
    if wanted is not None:
        parent = _clean_prefix(wanted)
        root = _root_above(parent, modules) if parent in parents else None
        return [(parent, root or parent)] if parent in parents else []
    split = (m.rpartition(".") for m in modules if m.endswith(EMBEDDINGS))
    embedding_parents = {f"{parent}{dot}" for parent, dot, leaf in split if leaf in EMBEDDINGS}
    if beside := sorted(parents & embedding_parents):
        return [(parent, parent) for parent in beside]
    above = ((parent, _root_above(parent, modules)) for parent in sorted(parents))
    return [(parent, root) for parent, root in above if root is not None]


def _root_above(parent: str, modules: Iterable[str]) -> str | None:
    """Return the nearest prefix, the list's own parent or the one above, that holds a table."""
    if is_other_sense(parent):
        return None
    above = "".join(f"{segment}." for segment in parent.split(".")[:-2])
    for root in dict.fromkeys((parent, above)):
        below = (m[len(root) :] for m in modules if m.startswith(root))
        near = [m for m in below if m.count(".") < 2 and not is_other_sense(m)]
        if any(is_token_table(m.rpartition(".")[2]) for m in near):
            return root
    return None


def _largest_list(root: str, lists: Mapping[tuple[str, str], int]) -> str:
    name = max((n for parent, n in sorted(lists) if parent == root), key=lambda n: lists[root, n])
    return f"{root}{name}."


def _clean_prefix(text: str) -> str:
    """Return `model.` for `model`, `model.` and `model.layers`."""
    segments = [segment for segment in text.split(".") if segment]
    if segments and segments[-1] in LISTS:
        segments.pop()
    return "".join(f"{segment}." for segment in segments)


def _no_tower(
    model: Model, side: str, lists: Mapping[tuple[str, str], int], wanted: str | None
) -> AlignmentError:
    found = [f"{parent}{name}" for parent, name in sorted(lists)]
    examples = ", ".join(sorted(model.shapes)[:3]) or "none at all"
    lines = [
        f"{model.label} has no list of layers under {wanted!r}, which the map calls its tower."
        if wanted is not None
        else f"{model.label} has no language tower: no list of layers ({', '.join(LISTS)}) beside"
        f" a token embedding ({', '.join(EMBEDDINGS)}).",
        f"  lists of layers found: {', '.join(found[:5]) or 'none'}"
        + (f" and {len(found) - 5} more" if len(found) > 5 else ""),
        f"  its names look like: {examples}",
    ]
    how = (
        f"Say which of the lists is the tower of the {side} in a file given with --map"
        if lists
        else f"Name the tensors of the {side}'s tower in a file given with --map"
    )
    return AlignmentError("\n".join(lines), remedy=f"{how}: drift-prior guide layouts")
