"""Give the modules of a layer names that say their class, by structure and shape.

Names of llama and its kin say it themselves (`self_attn`, `mlp`). Where a layer has none that do,
what a module holds tells: query and key make attention, a state or a convolution kernel makes a
mixer, a matrix and one of the transposed shape make an mlp.
"""

import re
from collections.abc import Iterable, Mapping

from drift_merge.names.modules import ATTENTION, MIXERS, MLP, classify
from drift_merge.names.tensors import Shape

_QUERY = re.compile(
    r"(?:^|\.)(?:q|to_q|q_proj|wq|query|q_a_proj|qkv\w*|query_key_value|att_proj)\."
)
_STATE = re.compile(r"(?:^|\.)(?:A_log|dt_bias|dt_proj|x_proj|conv1d|short_conv|conv)(?:\.|$)")
_LEAVES = {  # Molmo, OPT, BLOOM's kin
    "self_attn": re.compile(r"attn?_(?:proj|out)\.|query_key_value\."),
    "mlp": re.compile(r"(?:ff_(?:proj|out)|fc[12]|c_fc)\."),
}
_UNION = "mixer"  # Nemotron-H calls every block of a layer so, whatever it is
_NO_MLP = re.compile(r"norm|adapter|lora|altup|laurel|per_layer|(?:^|\.)hc_|embed", re.IGNORECASE)


def named_by_class(tails: Mapping[str, Shape | None]) -> dict[str, str]:
    """Return tail -> canonical tail for the tensors of one layer.

    Args:
        tails: what stands behind `layers.<n>.`, llama's names for what has them, with shapes.

    >>> sorted(named_by_class({"fc1.weight": (64, 32), "fc2.weight": (32, 64)}).values())
    ['mlp.fc1.weight', 'mlp.fc2.weight']
    """
    found = {tail: tail for tail in tails}
    union = [tail for tail in tails if tail.startswith(f"{_UNION}.")]
    word = _word_of(union)
    if word != _UNION:
        found.update((tail, word + tail[len(_UNION) :]) for tail in union)
    classes = {tail: classify(f"layers.0.{name}") for tail, name in found.items()}
    for group in sorted({_group(tail) for tail in tails} - {"", _UNION}):
        own = [tail for tail in tails if tail.startswith(f"{group}.")]
        word = _word_of(own)
        is_known = word != _UNION or _has_state(own)
        # Where names say the class of a part, they say enough.
        if is_known and {classes[tail] for tail in own} <= {"other", "norm"}:
            found.update((tail, f"{word}.{tail}") for tail in own)
            classes.update((tail, classify(f"layers.0.{found[tail]}")) for tail in own)
    for tail in tails:
        if classes[tail] == "other" and (word := _word_of_leaf(tail)):
            found[tail] = f"{word}.{tail}"
            classes[tail] = classify(f"layers.0.{found[tail]}")
    if "mlp" not in classes.values():
        for tail in _mlp_by_shape({t: tails[t] for t, c in classes.items() if c == "other"}):
            found[tail] = f"mlp.{tail}"
    return found


def _word_of(tails: Iterable[str]) -> str:
    """Return the module that the tensors of a block make: attention, mlp or a mixer."""
    tails = list(tails)
    inner = [tail.partition(".")[2] for tail in tails]
    if _has_state(tails):
        return _UNION
    if any(_QUERY.search(tail) for tail in inner):
        return "self_attn"
    parts = {segment for tail in inner for segment in tail.split(".")}
    return "mlp" if parts & {"up_proj", "down_proj", "experts", "fc1", "w1"} else _UNION


def _word_of_leaf(tail: str) -> str:
    """Return the module of a matrix of the layer itself, by its name; "" where none says it."""
    return next((word for word, pattern in _LEAVES.items() if pattern.match(tail)), "")


def _has_state(tails: Iterable[str]) -> bool:
    return any(_STATE.search(tail.partition(".")[2]) for tail in tails)


def _group(tail: str) -> str:
    """Return the module of the layer that a tensor is in; "" for a leaf of the layer itself."""
    segments = tail.split(".")
    is_group = len(segments) > 2 and segments[0] not in ATTENTION | MLP | MIXERS
    return segments[0] if is_group and not _NO_MLP.search(segments[0]) else ""


def _mlp_by_shape(tails: Mapping[str, Shape | None]) -> list[str]:
    """Return the matrices that lead to a wider space and back, and their biases."""
    shapes = {t: s for t, s in tails.items() if s and len(s) == 2 and not _NO_MLP.search(t)}
    pairs = {s for s in shapes.values() if (s[1], s[0]) in shapes.values() and s[0] != s[1]}
    modules = {t.rpartition(".")[0] for t, s in shapes.items() if s in pairs}
    return [t for t in tails if t.rpartition(".")[0] in modules]
