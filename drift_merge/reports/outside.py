"""Pairs what two MLLMs hold beside their language towers: vision tower, connector, the rest."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from drift_merge.names.tensors import Alignment, Pair, identity_parts
from drift_merge.reports.places import part_of
from drift_merge.storage.checkpoint import Checkpoint
from drift_merge.storage.quantized import FLOATS


@dataclass(frozen=True, slots=True)
class OutsidePairs:
    """An account of the tensors outside the towers; each is in one of these."""

    pairs: tuple[Pair, ...]  # canonical is the stored name in B, parts are A's
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]
    shape_mismatch: tuple[str, ...]  # stored names in B
    no_numbers: tuple[str, ...]  # tables of indices and masks, quantized codes


def outside_names(alignment: Alignment, side: str) -> list[str]:
    """Stored names outside the tower of one side: "reasoner" or "mllm"."""
    return [
        name
        for record in alignment.records
        if record.status == "outside_tower"
        for name in getattr(record, side)
    ]


def pair_outside(alignment: Alignment, a: Checkpoint, b: Checkpoint) -> OutsidePairs:
    """Pair by stored name; `model.` before it, which some versions write, does not matter."""
    ours, theirs = outside_names(alignment, "reasoner"), outside_names(alignment, "mllm")
    partners = partners_of(theirs, ours)
    pairs, mismatch, no_numbers = [], [], []
    for name in theirs:
        if name not in partners:
            continue
        here, there = b.tensors[name], a.tensors[partners[name]]
        if here.shape != there.shape:
            mismatch.append(name)
        elif here.dtype not in FLOATS or there.dtype not in FLOATS:
            no_numbers.append(name)
        else:
            parts = identity_parts(partners[name], here.shape)
            part = part_of(name, is_tower=False)
            pairs.append(Pair(name, name, here.shape, parts, part, None))
    used = set(partners.values())
    return OutsidePairs(
        tuple(pairs),
        tuple(name for name in ours if name not in used),
        tuple(name for name in theirs if name not in partners),
        tuple(mismatch),
        tuple(no_numbers),
    )


def partners_of(names: Sequence[str], others: Sequence[str]) -> Mapping[str, str]:
    """Name -> the same one among others, or the one that differs by a leading `model.`."""
    exact = set(others)
    bare: dict[str, list[str]] = {}
    for other in others:
        bare.setdefault(other.removeprefix("model."), []).append(other)
    found = {}
    for name in names:
        alike = bare.get(name.removeprefix("model."), [])
        if name in exact:
            found[name] = name
        elif len(alike) == 1:
            found[name] = alike[0]
    return found
