"""One parameter under two stored names: which names of the mllm are second names of another.

A head that is the embedding and is stored too, blocks that are stored twice: each is one
parameter and gets one result. What is of equal bytes is known from the data (`Model.copies`);
where no data was read, from the config alone.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import takewhile

from drift_merge.names.lineage import is_tied
from drift_merge.names.modules import canonical_order, layer_of
from drift_merge.names.pairing import TowerSide
from drift_merge.names.tables import table_of
from drift_merge.names.tensors import Finding

EMBEDDING, HEAD = "embed_tokens.weight", "lm_head.weight"


@dataclass(frozen=True, slots=True)
class SecondNames:
    """The second names of one alignment."""

    of: Mapping[str, tuple[str, ...]]  # stored name in the mllm -> its other stored names
    alike: Mapping[str, str]  # canonical name -> that of an earlier layer, equal on both sides
    apart: frozenset[str]  # stored names of equal bytes whose partners are not: on their own
    side: TowerSide  # the mllm's, without the second names


def find_second_names(ours: TowerSide, theirs: TowerSide) -> SecondNames:
    """Find the second names among the mllm's tensors.

    Equal bytes prove nothing by themselves: experts that were copied from one are equal until
    they are trained. A name in the tower is a second one if both are tables of the vocabulary,
    or both belong to a block that is equal as a whole and that the reasoner stores once.
    """
    of: dict[str, tuple[str, ...]] = {}
    alike: dict[str, str] = {}
    apart: set[str] = set()
    dropped: set[str] = set()
    canonical = {stored: name for name, stored in theirs.stored.items()}
    blocks = _Blocks(ours, theirs)
    for names in _classes(theirs):
        inside = sorted((canonical[n] for n in names if n in canonical), key=canonical_order)
        found: dict[str, list[str]] = {theirs.stored[name]: [] for name in inside}
        for first, name in _comparable(inside):
            relation = blocks.relation(first, name)
            if relation == "one":
                found[theirs.stored[first]].append(theirs.stored[name])
                del found[theirs.stored[name]]
                dropped.add(name)
            elif relation == "alike":
                alike[name] = first
            elif relation == "apart":
                apart.add(theirs.stored[name])
        outside = [name for name in names if name not in theirs.tower.canonical]
        for other in outside if inside else ():
            owner = max(found, key=lambda stored: _shared_end(stored, other))
            if _is_twin(owner, other, canonical[owner]):
                found[owner].append(other)
        of.update((owner, tuple(rest)) for owner, rest in found.items() if rest)
    left = {name: stored for name, stored in theirs.stored.items() if name not in dropped}
    shapes = {name: theirs.shapes[name] for name in left}
    return SecondNames(of, alike, frozenset(apart), replace(theirs, stored=left, shapes=shapes))


def _comparable(names: list[str]) -> Iterator[tuple[str, str]]:
    """Each name with the first before it that may be the same: a table, or one of its place."""
    firsts: dict[object, str] = {}
    for name in names:
        first = firsts.setdefault("table" if table_of(name) else tuple(name.split(".")[2:]), name)
        if first != name:
            yield first, name


class _Blocks:
    """The modules of the layers, to be compared as a whole."""

    def __init__(self, ours: TowerSide, theirs: TowerSide) -> None:
        self._sides = (ours, theirs)
        self._names: tuple[dict[str, set[str]], ...] = ({}, {})
        if theirs.model.copies:
            for side, found in zip(self._sides, self._names, strict=True):
                for name in side.stored:
                    found.setdefault(_block(name), set()).add(name)

    def relation(self, first: str, other: str) -> str:
        """What two equal tensors of a tower are: "one" parameter, "alike", "apart", or nothing.

        Blocks that are alike in both models may be one or not; what they become is equal in any
        case, once random masks are.
        """
        if table_of(first) and table_of(other):
            return "one"
        ours = self._sides[0].stored
        one, two = _block(first), _block(other)
        if first not in ours or not self._is_equal(1, one, two):
            return self._apart(first, other)
        if two not in self._names[0]:
            # A block of a layer that the reasoner has otherwise: it is stored once there.
            layer = ".".join(two.split(".")[:2]) + "."
            return "one" if any(block.startswith(layer) for block in self._names[0]) else ""
        return "alike" if self._is_equal(0, one, two) else self._apart(first, other)

    def _apart(self, first: str, other: str) -> str:
        ours = self._sides[0]
        copies, stored = ours.model.copies or {}, ours.stored
        if first not in stored or other not in stored:
            return ""
        one = copies.get(stored[first])
        return "" if one is not None and one == copies.get(stored[other]) else "apart"

    def _is_equal(self, number: int, one: str, two: str) -> bool:
        """Whether every tensor of one block of a side is a copy of that of the other.

        A norm by itself proves nothing, as few values are often equal.
        """
        side, names = self._sides[number], self._names[number]
        copies = side.model.copies or {}

        def content(block: str) -> dict[str, str | None]:
            return {n[len(block) :]: copies.get(side.stored[n]) for n in names.get(block, ())}

        found = content(one)
        has_matrix = any(len(side.shapes[name] or ()) > 1 for name in names.get(one, ()))
        return has_matrix and None not in found.values() and found == content(two)


def _block(canonical: str) -> str:
    """The module of a layer that a tensor is in: `layers.3.mlp`."""
    return ".".join(canonical.split(".")[:3])


def _is_twin(stored: str, other: str, canonical: str) -> bool:
    """Whether two stored names end alike, the number of the layer included; any, of a table."""
    if table_of(canonical):
        return True
    shared, layer = _shared_end(stored, other), layer_of(canonical)
    segments = stored.split(".")[-shared:] if shared else []
    return shared > 1 and (layer is None or any(segment.isdigit() for segment in segments))


def _classes(side: TowerSide) -> list[list[str]]:
    """Lists of stored names, each of one parameter as far as its own model knows."""
    if side.model.copies is None:
        names = [side.stored.get(EMBEDDING), side.stored.get(HEAD)]
        is_one = is_tied(side.model.config) and None not in names
        if not is_one or side.shapes[EMBEDDING] != side.shapes[HEAD]:
            return []
        return [[name for name in names if name]]
    classes: dict[str, list[str]] = {}
    for name, first in side.model.copies.items():
        classes.setdefault(first, []).append(name)
    return list(classes.values())


def _shared_end(one: str, other: str) -> int:
    """How many segments two names have in common at their ends."""
    ends = zip(reversed(one.split(".")), reversed(other.split(".")), strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], ends))


def is_listed_only(name: str, half: TowerSide) -> bool:
    """Whether a head is stored beside the embedding that it is, by its config or its bytes."""
    if not name.startswith("lm_head."):
        return False
    copies, stored = half.model.copies or {}, half.stored
    embedding = copies.get(stored.get(EMBEDDING, ""))
    is_copy = embedding is not None and embedding == copies.get(stored[name])
    return is_copy or bool(is_tied(half.model.config))


def second_name_findings(found: SecondNames) -> list[Finding]:
    """Say what has second names, and where config and data disagree."""
    findings, model = [], found.side.model
    if found.of:
        examples = [f"{', '.join(rest)} (= {name})" for name, rest in found.of.items()]
        more = f" and {len(examples) - 3:,} more" if len(examples) > 3 else ""
        is_read = model.copies is not None
        how = "equal bytes" if is_read else "the config says so; no data was compared"
        noun = "parameter is" if len(examples) == 1 else "parameters are"
        message = (
            f"{len(examples):,} {noun} stored under more than one name in the mllm ({how}):"
            f" {'; '.join(examples[:3])}{more}."
        )
        remedy = "Nothing to do: each gets one result, written under every name."
        findings.append(Finding("second_names", "info", message, remedy))
    if found.apart:
        message = (
            f"{len(found.apart):,} tensors of the mllm are copies of others, but their partners in"
            f" the reasoner are not, e.g. {min(found.apart)}: each is merged with its own."
        )
        remedy = "Nothing to do if they were copied to be trained apart, as experts are."
        findings.append(Finding("copies_apart", "info", message, remedy))
    if is_tied(model.config) and {EMBEDDING, HEAD} <= found.side.stored.keys():
        message = (
            "The mllm's config ties the head to the embedding, but both are stored and differ."
            " transformers loads them as two, and so they are merged."
        )
        remedy = "Check the checkpoint; if they are two, say tie_word_embeddings: false there."
        findings.append(Finding("tied_apart", "warning", message, remedy))
    return findings
