"""The table that ends `compute`: norms, cosines and equal entries by module, and what they mean.

Cosines here are of the two towers, cos(theta_reasoner, theta_mllm). The published cosines and
merging results that the advice quotes are those of DRIFT (arXiv 2510.15050).
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod, sqrt

from drift_merge.storage.measured import TensorRecord

ORDER = ("attn", "mlp", "mixer", "norm", "embed", "head", "other")


@dataclass(frozen=True, slots=True)
class ModuleRow:
    """One row: a module of the tower, or all of them."""

    module: str
    num_tensors: int
    num_elements: int
    norm_delta: float  # L2 over all its tensors
    relative_norm: float  # norm_delta / norm of the mllm's tensors
    cosine: float  # of reasoner and mllm, over all its tensors as one vector, in [-1, 1]
    equal: float | None  # share of entries of delta that are exactly 0; None: not measured


def summarize(tensors: Mapping[str, TensorRecord]) -> list[ModuleRow]:
    """Rows by module in a fixed order, then one row `all`. Tensors with NaN or Inf count as 0."""
    found = {str(entry["module"]) for entry in tensors.values()}
    rows = [
        _row(module, [e for e in tensors.values() if e["module"] == module])
        for module in ORDER
        if module in found
    ]
    return [*rows, _row("all", tensors.values())]


def _row(module: str, entries: Iterable[TensorRecord]) -> ModuleRow:
    listed = list(entries)
    delta = mllm = reasoner = product = 0.0
    for entry in listed:
        ours, theirs = entry["norm_reasoner"] or 0.0, entry["norm_mllm"] or 0.0
        delta += (entry["norm_delta"] or 0.0) ** 2
        mllm += theirs**2
        reasoner += ours**2
        product += (entry["cosine"] or 0.0) * ours * theirs
    scale = sqrt(mllm) * sqrt(reasoner)
    shares = [(s, prod(e["shape"])) for e in listed if (s := e.get("equal")) is not None]
    compared = sum(numel for _, numel in shares)
    return ModuleRow(
        module,
        len(listed),
        sum(prod(entry["shape"]) for entry in listed),
        sqrt(delta),
        sqrt(delta / mllm) if mllm else 0.0,
        product / scale if scale else 0.0,
        sum(share * numel for share, numel in shares) / compared if compared else None,
    )


def show_share(equal: float | None) -> str:
    """A share of equal entries as text; `-` where it was not measured."""
    return "-" if equal is None else f"{equal:.2%}"


def equal_sentence(rows: Sequence[ModuleRow], origin: str) -> str:
    """One sentence: how much of the reasoner equals `origin` (mllm or base); empty if unmeasured.

    The updates of RL in bfloat16 are mostly too small to change a weight.
    """
    equal = rows[-1].equal
    if equal is None:
        return ""
    meaning = ": few weights differ, as after RL in bfloat16" if equal >= 0.5 else ""
    return f"Exactly equal entries of reasoner and {origin}: {show_share(equal)}{meaning}."


@dataclass(frozen=True, slots=True)
class StoredQuality:
    """What a compressed or low-rank prior keeps of delta: cosines of delta and its stored form."""

    cosine: float  # over all tensors as one vector
    worst: float  # of one tensor
    worst_name: str
    rank: int = 0  # the largest of its factors; 0 without any
    energy: float = 1.0  # share of |delta|^2 in the directions kept, of all that has factors


def stored_cosines(tensors: Mapping[str, TensorRecord]) -> StoredQuality | None:
    """The cosines that a compressed or low-rank prior has recorded; None for any other."""
    cosines = {n: c for n, e in tensors.items() if (c := e.get("cosine_stored")) is not None}
    if not cosines:
        return None
    product = delta = stored = 0.0
    for name, cosine in cosines.items():
        ours, theirs = tensors[name]["norm_delta"] or 0.0, tensors[name]["norm_stored"] or 0.0
        product += cosine * ours * theirs
        delta += ours**2
        stored += theirs**2
    scale = sqrt(delta) * sqrt(stored)
    worst = min(cosines, key=cosines.__getitem__)
    low = [entry for entry in tensors.values() if "rank" in entry]
    squares = [(entry["norm_delta"] or 0.0) ** 2 for entry in low]
    kept = sum(entry.get("energy", 1.0) * sq for entry, sq in zip(low, squares, strict=True))
    return StoredQuality(
        product / scale if scale else 0.0,
        cosines[worst],
        worst,
        max((entry["rank"] for entry in low), default=0),
        kept / sum(squares) if sum(squares) else 1.0,
    )


def stored_sentence(tensors: Mapping[str, TensorRecord]) -> str:
    """One sentence: what the stored form of a prior keeps; empty where it is delta itself."""
    kept = stored_cosines(tensors)
    if kept is None:
        return ""
    how = f"Rank {kept.rank}: {kept.energy:.2%} of the energy |delta|^2 is kept;"
    return (
        f"{how if kept.rank else 'Compressed:'} cosine of delta and its stored form "
        f"{kept.cosine:.6f} overall, {kept.worst:.6f} at worst ({kept.worst_name})."
    )


def advice(cosine: float) -> str:
    """One sentence: what the cosine of the two towers says about merging them."""
    if cosine < 0.3:
        return (
            f"Cosine {cosine:.3f}: these two are not relatives (unrelated weights have cosine 0); "
            "neither a merge nor this prior can be expected to help."
        )
    if cosine < 0.8:
        return (
            f"Cosine {cosine:.3f}: the towers are far apart. Published linear merges of such pairs "
            "(0.63 to 0.77) changed MathVerse by -8.2 to -0.2 points; use the prior in training."
        )
    if cosine < 0.97:
        return (
            f"Cosine {cosine:.3f}: between the published pairs (merging hurt below 0.77 and helped "
            "on MathVista from 0.975); try several weights and measure."
        )
    return (
        f"Cosine {cosine:.3f}: close relatives. Published linear merges of such pairs (0.975 and "
        "above) gained 0.8 to 1.4 points on MathVista, though one lost 5.3 on MathVision."
    )
