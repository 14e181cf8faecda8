"""Give the tensors of one language tower their canonical names, once it has been found."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from drift_merge.errors import AlignmentError
from drift_merge.names.layouts import (
    EMBEDDINGS,
    HEADS,
    NORMS,
    is_adapter_weight,
    is_buffer,
    is_frozen_copy,
    rename_tail,
    strip_wrappers,
)
from drift_merge.names.tables import is_added_piece
from drift_merge.names.tensors import Model


@dataclass(frozen=True, slots=True)
class Tower:
    """The language tower of one model: which stored tensor has which canonical name."""

    root: str  # stored prefix, wrappers stripped: "model.language_model." or "" for a bare model
    canonical: Mapping[str, str]  # stored name -> canonical name, buffers included
    buffers: frozenset[str]  # stored names of tables that code derives; never selected
    inserted: tuple[int, ...]  # stored numbers of the cross-attention layers left out
    outside: tuple[str, ...]  # stored names of everything else
    num_layers: int  # without the inserted ones


def name_tower(
    model: Model,
    names: Mapping[str, str],
    layers: str | None,
    *,
    mapped: Mapping[str, str | None],
    side: str,
) -> Tower:
    """Name the tensors of the tower whose list of layers is `layers`.

    Args:
        model: for shapes (a causal mask is told from a bias by its shape) and messages.
        names: every stored name -> the same with wrappers stripped.
        layers: stripped prefix of the list with its dot, "model.layers."; None if `mapped`
            alone makes the tower.
        mapped: stored name -> canonical name by `--map`, None where it leaves a tensor out.
        side: "reasoner" or "mllm", for messages.

    Raises:
        AlignmentError: if two stored tensors have one canonical name.
    """
    canonical: dict[str, str] = {}
    inserted: tuple[int, ...] = ()
    root = "" if layers is None else "".join(f"{part}." for part in layers.split(".")[:-2])
    if layers is not None:
        free = {stored: name for stored, name in names.items() if stored not in mapped}
        inserted, numbers = _number_layers(free.values(), layers)
        head = _find_head(set(free.values()), root)
        for stored, name in free.items():
            found = _canonical(name, root, layers, numbers, head)
            if found is not None and not is_adapter_weight(name):
                canonical[stored] = found
    canonical.update((stored, found) for stored, found in mapped.items() if found is not None)
    _drop_frozen_copies(canonical)
    _check_injective(canonical, model, side)
    numbered = {name.split(".", 2)[1] for name in canonical.values() if name.startswith("layers.")}
    return Tower(
        root=root,
        canonical=canonical,
        buffers=frozenset(n for n, c in canonical.items() if is_buffer(c, model.shapes[n])),
        inserted=inserted,
        outside=tuple(name for name in names if name not in canonical),
        num_layers=len(numbered),
    )


def _number_layers(
    names: Collection[str], prefix: str
) -> tuple[tuple[int, ...], dict[str, str] | None]:
    """Return the inserted cross-attention layers and the new numbers of the others.

    Inserted layers have cross-attention and no self-attention. Without any the numbers stay
    as they are (None), gaps included.
    """
    if not any(".cross_attn." in name for name in names):
        return (), None
    every: set[str] = set()
    crossing: set[str] = set()
    attending: set[str] = set()
    for name in names:
        number, _, tail = name[len(prefix) :].partition(".")
        if not name.startswith(prefix) or not number.isdigit():
            continue
        every.add(number)
        if tail.startswith("cross_attn."):
            crossing.add(number)
        elif tail.startswith(("self_attn.", "attention.", "attn.")):
            attending.add(number)
    inserted = crossing - attending
    if not inserted:
        return (), None
    others = sorted(every - inserted, key=int)
    return tuple(sorted(map(int, inserted))), {n: str(i) for i, n in enumerate(others)}


def _find_head(names: set[str], root: str) -> str | None:
    """Return the prefix of the head: beside the tower or beside one of its parents."""
    segments = root.split(".")[:-1]
    for depth in range(len(segments), -1, -1):
        parent = "".join(f"{segment}." for segment in segments[:depth])
        for head in HEADS:
            if f"{parent}{head}.weight" in names:
                return f"{parent}{head}."
    return None


def _canonical(
    name: str, root: str, prefix: str, numbers: Mapping[str, str] | None, head: str | None
) -> str | None:
    """Return the canonical name of a stripped name; None outside the tower."""
    if name.startswith(prefix):
        layer, _, tail = name[len(prefix) :].partition(".")
        number = layer if numbers is None else numbers.get(layer)
        if not tail or not layer.isdigit() or number is None:
            return None
        return f"layers.{number}.{rename_tail(tail)}"
    if head is not None and name.startswith(head):
        return f"lm_head.{name[len(head) :]}"
    if not name.startswith(root):
        return None
    module, _, leaf = name[len(root) :].partition(".")
    if not leaf or ("." in leaf and not (module in EMBEDDINGS and is_added_piece(leaf))):
        return None
    if module in EMBEDDINGS:
        return f"embed_tokens.{leaf}"
    if module in NORMS:
        return f"norm.{leaf}"
    return f"{module}.{leaf}" if is_buffer(f"{module}.{leaf}", None) else None


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
