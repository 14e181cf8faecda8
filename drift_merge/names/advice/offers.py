"""The map that a refusal offers: tried before it is printed, so that pasted it works; or none.

Offered are only names whose words say the same (`att.key`, `self_attn.k_proj`), or whose shape
leaves no choice. Rows that may lie in another order (Mistral's own wq and wk, fused matrices) and
what belongs to a quantized module are never offered: an equal shape tells nothing of them.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from itertools import product

from drift_merge.errors import DriftMergeError
from drift_merge.names.layers.leftovers import has_ordered_rows, is_within, words_of
from drift_merge.names.layers.promises import EMPTY_WORD
from drift_merge.names.layouts import strip_wrappers
from drift_merge.names.modules import classify, layer_of
from drift_merge.names.name_map import NameMap, name_rule, parse_name_map, write_name_map
from drift_merge.names.tensors import Alignment, Shape

Attempt = Callable[[NameMap], Alignment]  # aligns with a map; raises as `align` does

_MAX_LISTS = 3  # of each side, tried as its tower
_QUERIES = re.compile(r"\.[qk]_proj\.|\.(?:query|key)\.")
_LEAVES = frozenset(("weight", "bias"))
_EXPERT = re.compile(r"\.experts\.\d+\.")


@dataclass(slots=True)
class _Kind:
    """What one side alone has and is one tensor in every layer."""

    pattern: str  # of the stored names
    target: str  # of the canonical names
    shapes: dict[tuple[int | None, str], Shape | None] = field(default_factory=dict)  # by place
    is_selected: bool = False


def offer_names(alignment: Alignment, maps: NameMap, attempt: Attempt) -> str:
    """Return a map with which every selected leftover of an alignment has a partner; "" if none.

    Args:
        alignment: incomplete.
        maps: what the user's own map says; kept.
        attempt: aligns the same models with a map.
    """
    ours, theirs = (_kinds(alignment, side) for side in ("reasoner", "mllm"))
    pairs = _pair_kinds(ours, theirs)
    if not pairs:
        return ""
    sides = {"reasoner": maps.reasoner, "mllm": maps.mllm}
    for one, other in pairs:
        # The target is the name that says what the tensor is, so that --modules knows it.
        is_known = classify(_numbered(other.target)) != "other"
        side, source, target = ("reasoner", one, other) if is_known else ("mllm", other, one)
        rule = name_rule(source.pattern, target.target)
        sides[side] = replace(sides[side], rules=(*sides[side].rules, rule))
    found = NameMap(**sides)
    return write_name_map(found) if _settles(found, alignment, attempt) else ""


def offer_towers(lists: Mapping[str, list[str]], maps: NameMap, attempt: Attempt) -> str:
    """Return a map that says which list of layers is the tower, of both sides at once; "" if none.

    Args:
        lists: side -> its lists of layers, the likely ones first; only of sides that need one.
        maps: what the user's own map says; kept.
        attempt: aligns the same models with a map.
    """
    choices = [[(side, name) for name in names[:_MAX_LISTS]] for side, names in lists.items()]
    for chosen in product(*choices):
        sides = {"reasoner": maps.reasoner, "mllm": maps.mllm}
        sides |= {side: replace(sides[side], tower=name) for side, name in chosen}
        found = NameMap(**sides)
        alignment = _try(found, attempt)
        if alignment is not None and _is_complete(alignment):
            return write_name_map(found)
        if alignment is not None and (text := offer_names(alignment, found, attempt)):
            return text
    return ""


def _is_complete(alignment: Alignment) -> bool:
    has_all = all(finding.code != EMPTY_WORD for finding in alignment.findings)
    return has_all and 0 < alignment.num_selected == alignment.num_matched


def _try(maps: NameMap, attempt: Attempt) -> Alignment | None:
    """Align with a map as it will be read from its file; None if that is refused."""
    try:
        return attempt(parse_name_map(write_name_map(maps)))
    except DriftMergeError:
        return None


def _settles(maps: NameMap, before: Alignment, attempt: Attempt) -> bool:
    """Whether all that was selected before is matched with this map."""
    after = _try(maps, attempt)
    if after is None or after.num_matched < after.num_selected:
        return False
    matched = {n for r in after.records if r.status == "matched" for n in (*r.reasoner, *r.mllm)}
    unused = ("not_selected", "outside_tower")
    used = (r for r in before.records if r.status not in unused)
    return all(name in matched for r in used for name in (*r.reasoner, *r.mllm))


def _kinds(alignment: Alignment, side: str) -> list[_Kind]:
    """What one side alone has, by kind; without what must not be offered."""
    root = (alignment.reasoner if side == "reasoner" else alignment.mllm).tower
    leaves: dict[str, set[str]] = defaultdict(set)  # of every module of this side
    for record in alignment.records:
        for stored in getattr(record, side):
            module, _, leaf = stored.rpartition(".")
            leaves[module].add(leaf)
    found: dict[tuple[str, str], _Kind] = {}
    for record in alignment.records:
        is_alone = bool(record.reasoner) != bool(record.mllm) and record.status != "outside_tower"
        if not is_alone or len(getattr(record, side)) != 1:
            continue
        (stored,) = getattr(record, side)
        is_plain = leaves[stored.rpartition(".")[0]] <= _LEAVES  # else quantized, or of its own
        if not is_plain or has_ordered_rows(f".{stored}"):
            continue
        key = _pattern(strip_wrappers(stored), root), _target(record.name)
        kind = found.setdefault(key, _Kind(*key))
        kind.shapes[_place(record.name)] = record.shape
        kind.is_selected |= record.status == f"only_{side}"
    return list(found.values())


def _pair_kinds(ours: list[_Kind], theirs: list[_Kind]) -> list[tuple[_Kind, _Kind]]:
    """Pair kinds of equal shapes in every layer: those of the same words, then what is left."""
    pairs: list[tuple[_Kind, _Kind]] = []
    for are_alike in (_have_same_words, _have_words_within, _leave_no_choice):
        taken = {id(kind) for pair in pairs for kind in pair}
        one, other = ([k for k in side if id(k) not in taken] for side in (ours, theirs))
        found = [(a, b) for a in one for b in other if a.shapes == b.shapes and are_alike(a, b)]
        counts = Counter(id(kind) for pair in found for kind in pair)
        pairs += [(a, b) for a, b in found if counts[id(a)] == counts[id(b)] == 1]
    # A tensor of no known class was selected by no word: its partner was.
    return [(one, other) for one, other in pairs if one.is_selected or other.is_selected]


def _have_same_words(one: _Kind, other: _Kind) -> bool:
    words = words_of(_numbered(one.target))
    return bool(words) and words == words_of(_numbered(other.target))


def _have_words_within(one: _Kind, other: _Kind) -> bool:
    return is_within(words_of(_numbered(one.target)), words_of(_numbered(other.target)))


def _leave_no_choice(one: _Kind, other: _Kind) -> bool:
    """Whether nothing but the shape decides; not for q and k, whose rows may be permuted."""
    names = f".{one.target}", f".{other.target}"
    return not any(_QUERIES.search(n) for n in names) and one.target.startswith("layers.")


def _numbered(target: str) -> str:
    return target.replace("{layer}", "0").replace("{expert}", "0")


def _target(name: str) -> str:
    name = re.sub(r"^layers\.\d+\.", "layers.{layer}.", name)
    return _EXPERT.sub(".experts.{expert}.", name)


def _place(name: str) -> tuple[int | None, str]:
    """The numbers of layer and expert."""
    expert = _EXPERT.search(name)
    return layer_of(name), expert[0] if expert else ""


def _pattern(stored: str, root: str) -> str:
    """The pattern of a stored name: its numbers of layer and expert are placeholders."""
    head = root if stored.startswith(root) else ""
    tail = re.sub(r"(^|\.)\d+\.", r"\1{layer}.", stored[len(head) :], count=1)
    return head + _EXPERT.sub(".experts.{expert}.", tail)
