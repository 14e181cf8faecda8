"""Where a tensor stands in a heat map: part of the model, layer, and what it is called there."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from drift_merge.names.layouts import is_other_sense
from drift_merge.names.modules import classify

LANGUAGE = "language tower"
PARTS = (LANGUAGE, "vision tower", "audio", "connector", "other")

_CONNECTOR = re.compile(
    r"projector|connector|merger|resampler|perceiver|aligner|abstractor|qformer|(?:^|\.)mlp1\."
    r"|multi_?modal|(?:^|[._])mm_|embed_vision|embed_audio"
)
_AUDIO = re.compile(r"audio|speech|codec")
_LAYERS = re.compile(r"(?:^|\.)(?:layers?|blocks?|h|resblocks|block_list)\.(\d+)\.(.+)$")
_EXPERT = re.compile(r"(\bexperts\.)\d+\.")


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor stands in a heat map."""

    part: str
    layer: int | None
    kind: str  # what it is called in its layer; the whole name where there is no layer


def place_of(name: str, part: str) -> Place:
    """The place of a tensor; all experts of a layer share theirs.

    >>> place_of("layers.3.mlp.experts.7.up_proj.weight", LANGUAGE)
    Place(part='language tower', layer=3, kind='mlp.experts.up_proj')
    """
    found = None if part == "connector" else _LAYERS.search(name)
    if found is None:
        return Place(part, None, name.removesuffix(".weight"))
    kind = _EXPERT.sub(r"\1", found[2]).removesuffix(".weight")
    return Place(part, int(found[1]), kind)


def part_of(name: str, *, is_tower: bool) -> str:
    """The part of a model that a tensor belongs to, by its stored name."""
    if is_tower:
        return LANGUAGE
    lower = name.lower()
    if _CONNECTOR.search(lower):
        return "connector"
    if _AUDIO.search(lower):
        return "audio"
    return "vision tower" if is_other_sense(name) else "other"


def place_order(place: Place) -> tuple[int, int, int]:
    """A key that sorts parts in their order, layers by number, then what has no layer."""
    return PARTS.index(place.part), place.layer is None, place.layer or 0


def kinds_of(places: Iterable[Place]) -> list[str]:
    """The kinds among the places of layers, in the order in which a layer uses them."""
    rank = ("norm", "attn", "mixer", "mlp", "other")
    kinds = dict.fromkeys(place.kind for place in places if place.layer is not None)
    first = {kind: number for number, kind in enumerate(kinds)}

    def order(kind: str) -> tuple[int, int, bool, int]:
        module = classify(f"layers.0.{kind}.weight")
        steps = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
        step = next((n for n, s in enumerate(steps) if s in kind), len(steps))
        return (
            rank.index(module) if module in rank else len(rank),
            step,
            "bias" in kind,
            first[kind],
        )

    return sorted(kinds, key=order)
