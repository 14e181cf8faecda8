"""Give the tensors of one language tower their canonical names, once it has been found."""

import re
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

from drift_merge.errors import AlignmentError
from drift_merge.names.layers.structure import named_by_class
from drift_merge.names.layouts import (
    EMBEDDINGS,
    HEADS,
    LISTS,
    NORMS,
    is_adapter_weight,
    is_buffer,
    is_frozen_copy,
    is_other_sense,
    is_token_table,
    rename_tail,
    strip_wrappers,
)
from drift_merge.names.lineage import text_config
from drift_merge.names.modules import classify
from drift_merge.names.tables import is_added_piece
from drift_merge.names.tensors import Model, Shape

_LISTS = re.compile(rf"(?:^|\.)(?:{'|'.join(LISTS)})\.\d+\.")
_FINAL_NORM = re.compile(r"(?:^|\.)(?:\w*_)?(?:layer_?norm|norm|ln)(?:_\w*)?$", re.IGNORECASE)
_APART = (*HEADS, "mtp")  # beside a tower without prefix, never in it
_MTP = ("eh_proj.", "enorm.", "hnorm.", "shared_head.")  # of a block that predicts more tokens


@dataclass(frozen=True, slots=True)
class Tower:
    """The language tower of one model: which stored tensor has which canonical name."""

    root: str  # stored prefix, wrappers stripped: "model.language_model." or "" for a bare model
    canonical: Mapping[str, str]  # stored name -> canonical name, buffers included
    buffers: frozenset[str]  # stored names of tables that code derives; never selected
    inserted: tuple[int, ...]  # stored numbers of the cross-attention layers left out
    outside: tuple[str, ...]  # stored names of everything else
    num_layers: int  # without the inserted ones
    mtp: tuple[int, ...] = ()  # stored numbers of blocks that predict more tokens; no layers
    extras: frozenset[str] = frozenset()
    # canonical names of what stands below the root beside layers, embedding, final norm and head;
    # where one side alone has it, it is outside


def name_tower(
    model: Model,
    names: Mapping[str, str],
    layers: str | None,
    *,
    mapped: Mapping[str, str | None],
    side: str,
    root: str | None = None,
) -> Tower:
    """Name the tensors of the tower whose list of layers is `layers`.

    Args:
        model: for shapes (a causal mask is told from a bias by its shape) and messages.
        names: every stored name -> the same with wrappers stripped.
        layers: stripped prefix of the list with its dot, "model.layers."; None if `mapped`
            alone makes the tower.
        mapped: stored name -> canonical name by `--map`, None where it leaves a tensor out.
        side: "reasoner" or "mllm", for messages.
        root: prefix of the tower, if that is not the parent of the list ("transformer." for
            "transformer.encoder.layers.").

    Raises:
        AlignmentError: if two stored tensors have one canonical name.
    """
    canonical: dict[str, str] = {}
    inserted: tuple[int, ...] = ()
    mtp: tuple[int, ...] = ()
    extras: set[str] = set()
    parent = "" if layers is None else "".join(f"{part}." for part in layers.split(".")[:-2])
    root = parent if root is None else root
    if layers is not None:
        free = {stored: name for stored, name in names.items() if stored not in mapped}
        inserted, mtp, numbers = _number_layers(free.values(), layers, model)
        beside = _Beside(model, free, root, parent, layers)
        for stored, name in free.items():
            if is_adapter_weight(name):
                continue
            if name.startswith(layers):
                found = _in_layer(name, layers, numbers)
            else:
                found = beside.canonical(name)
                if found is not None and beside.is_extra(found):
                    extras.add(found)
            if found is not None:
                canonical[stored] = found
        _name_by_class(canonical, model)
        blocks = {str(n) if numbers is None else numbers.get(str(n)) for n in mtp}
        extras |= {c for c in canonical.values() if _layer(c) in blocks} if blocks else set()
    canonical.update((stored, found) for stored, found in mapped.items() if found is not None)
    _drop_frozen_copies(canonical)
    _check_injective(canonical, model, side)
    numbered = {_layer(name) for name in canonical.values() if name not in extras} - {None}
    return Tower(
        root=root,
        canonical=canonical,
        buffers=frozenset(n for n, c in canonical.items() if is_buffer(c, model.shapes[n])),
        inserted=inserted,
        outside=tuple(name for name in names if name not in canonical),
        num_layers=len(numbered),
        mtp=mtp,
        extras=frozenset(extras),
    )


class _Beside:
    """What a tower holds beside its layers: embedding, final norm, head, and extras."""

    def __init__(
        self, model: Model, free: Mapping[str, str], root: str, parent: str, layers: str
    ) -> None:
        self.root, self.parent, self.layers = root, parent, layers
        # Nothing that is looked for lies deeper: an embedding in a module, a norm beside the list.
        dots = root.count(".") + max(1, parent[len(root) :].count(".")) + 1
        modules = {name.rpartition(".")[0] for name in free.values() if name.count(".") <= dots}
        below = {module[len(root) :] for module in modules if module.startswith(root)}
        self.embedding = _find_embedding(below)
        self.norm = self._find_norm(below)
        shapes = {name: model.shapes[stored] for stored, name in free.items()}
        self.head = _find_head(shapes, root, f"{root}{self.embedding}.")

    def canonical(self, name: str) -> str | None:
        """Return the canonical name of a tensor outside the layers; None outside the tower."""
        if self.head is not None and name.startswith(self.head):
            return f"lm_head.{name[len(self.head) :]}"
        if not name.startswith(self.root):
            return None
        tail = name[len(self.root) :]
        module, _, leaf = tail.rpartition(".")
        if self.embedding and tail.startswith(f"{self.embedding}."):
            rest = tail[len(self.embedding) + 1 :]
            if "." not in rest or is_added_piece(rest):
                return f"embed_tokens.{rest}"
        if module and module == self.norm:
            return f"norm.{leaf}"
        if is_buffer(tail, None) and tail.count(".") < 2:
            return tail
        if is_other_sense(tail) or _LISTS.search(tail) or tail.partition(".")[0] in _APART:
            return None
        return tail

    def is_extra(self, canonical: str) -> bool:
        """Whether the reasoner need not have a tensor of this name."""
        return not canonical.startswith(("embed_tokens.", "norm.", "lm_head."))

    def _find_norm(self, below: Collection[str]) -> str:
        """Return the final norm: known by its name, or the only norm beside the layers."""
        stem = self.parent[len(self.root) :]  # "encoder.", where the root is further up
        for where in (stem, ""):
            known = [f"{where}{name}" for name in NORMS if f"{where}{name}" in below]
            if known:
                return known[0]
        places = [
            module
            for module in sorted(below)
            if _FINAL_NORM.search(module)
            and module.count(".") <= stem.count(".")
            and not re.search(r"emb|pre_|per_layer|\d", module)
            and not is_other_sense(module)
        ]
        return places[0] if len(places) == 1 else ""


def _find_embedding(below: Collection[str]) -> str:
    """Return the module of the token embedding, as it is called below the root; "" without one."""
    for depth in (0, 1):
        found = [m for m in sorted(below) if m.count(".") == depth and not is_other_sense(m)]
        for rule in (EMBEDDINGS.__contains__, is_token_table):
            tables = [m for m in found if rule(m.rpartition(".")[2])]
            if tables:
                return tables[0]
    return ""


def _number_layers(
    names: Collection[str], prefix: str, model: Model
) -> tuple[tuple[int, ...], tuple[int, ...], dict[str, str] | None]:
    """Return the inserted cross-attention layers, the MTP blocks, and new numbers of the layers.

    Inserted layers have cross-attention and no self-attention. Without any the numbers stay
    as they are (None), gaps included.
    """
    modules: dict[str, set[str]] = defaultdict(set)  # of each layer, its own children
    for name in names:
        if name.startswith(prefix):
            number, _, tail = name[len(prefix) :].partition(".")
            module, dot, _ = tail.partition(".")
            modules[number].add(f"{module}{dot}")
    modules = {number: found for number, found in modules.items() if number.isdigit()}
    mtp = _mtp_blocks(modules, model)
    crossing = {n for n, found in modules.items() if "cross_attn." in found}
    own = ("self_attn.", "attention.", "attn.")
    inserted = {n for n in crossing if modules[n].isdisjoint(own)}
    predicting = tuple(sorted(map(int, mtp)))
    if not inserted:
        return (), predicting, None
    others = sorted(modules.keys() - inserted, key=int)
    return tuple(sorted(map(int, inserted))), predicting, {n: str(i) for i, n in enumerate(others)}


def _mtp_blocks(modules: Mapping[str, set[str]], model: Model) -> set[str]:
    """Return the numbers of blocks that predict more than the next token (DeepSeek-V3's MTP)."""
    config = text_config(model.config)
    count, more = config.get("num_hidden_layers"), config.get("num_nextn_predict_layers")
    found = {n for n, own in modules.items() if not own.isdisjoint(_MTP)}
    if isinstance(count, int) and isinstance(more, int) and len(modules) > count:
        found |= {n for n in modules if count <= int(n) < count + more}
    return found if len(found) < len(modules) else set()


def _find_head(shapes: Mapping[str, Shape | None], root: str, embedding: str) -> str | None:
    """Return the prefix of the head: beside the tower or beside one of its parents."""
    segments = root.split(".")[:-1]
    for depth in range(len(segments), -1, -1):
        parent = "".join(f"{segment}." for segment in segments[:depth])
        for head in HEADS:
            leaf = "weight" if "." not in head else "transform.dense.weight"
            shape = shapes.get(f"{parent}{head}.{leaf}", ())
            if shape is None or len(shape) == 2:
                return f"{parent}{head}."
    tables = [s for name, s in shapes.items() if name.startswith(embedding) and s and len(s) == 2]
    table = max(tables, default=None)  # Molmo keeps added rows in a second one
    pattern = re.compile(r"(?:head|output|logit|unembed|predictions\.decoder|ff_out)\w*\.weight$")
    alike = [
        name
        for name, shape in shapes.items()
        if shape == table and shape is not None and pattern.search(name)
    ]
    near = [n for n in alike if not _LISTS.search(n) and not is_other_sense(n)]
    return near[0].removesuffix("weight") if len(near) == 1 else None


def _layer(canonical: str) -> str | None:
    return canonical.split(".", 2)[1] if canonical.startswith("layers.") else None


def _in_layer(name: str, prefix: str, numbers: Mapping[str, str] | None) -> str | None:
    layer, _, tail = name[len(prefix) :].partition(".")
    number = layer if numbers is None else numbers.get(layer)
    if not tail or not layer.isdigit() or number is None:
        return None
    return f"layers.{number}.{rename_tail(tail)}"


def _name_by_class(canonical: dict[str, str], model: Model) -> None:
    """Let the names of layers whose modules are called otherwise say their class."""
    strange = {
        name.split(".", 2)[1]
        for name in canonical.values()
        if name.startswith("layers.") and (classify(name) == "other" or ".mixer." in name)
    }
    for number, stored in _by_layer(canonical) if strange else ():
        if number not in strange:
            continue
        start = len(f"layers.{number}.")
        tails = {canonical[name][start:]: name for name in stored}
        for tail, found in named_by_class({t: model.shapes[n] for t, n in tails.items()}).items():
            canonical[tails[tail]] = f"layers.{number}.{found}"


def _by_layer(canonical: Mapping[str, str]) -> Iterator[tuple[str, list[str]]]:
    layers: dict[str, list[str]] = defaultdict(list)
    for stored, name in canonical.items():
        if name.startswith("layers."):
            layers[name.split(".", 2)[1]].append(stored)
    yield from layers.items()


def _drop_frozen_copies(canonical: dict[str, str]) -> None:
    """Leave out the originals that PEFT keeps beside the modules it trains."""
    trained = {c for n, c in canonical.items() if not is_frozen_copy(n)}
    copies = [n for n, c in canonical.items() if is_frozen_copy(n) and c in trained]
    for name in copies:
        del canonical[name]


def _check_injective(canonical: Mapping[str, str], model: Model, side: str) -> None:
    if len(set(canonical.values())) == len(canonical):
        return
    seen: dict[str, str] = {}
    for stored, name in canonical.items():
        if name in seen:
            raise AlignmentError(
                f"{model.label}: {seen[name]} and {stored} both have the canonical name {name}.",
                remedy="Leave one of them out in a file given with --map:\n"
                f'{side}:\n  "{strip_wrappers(stored)}": null',
            )
        seen[name] = stored
