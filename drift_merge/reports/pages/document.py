"""What a page shows, as plain data: everything that can be read on it stands in here.

Numbers keep eight significant digits; None is what is not known, and `missing` says why.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from drift_merge.names.tensors import Finding
from drift_merge.reports.figures import (
    KINDS,
    FigureKind,
    Group,
    TensorFigures,
    cells,
    largest,
    modules,
    scale_of,
)
from drift_merge.reports.places import PARTS, Place, kinds_of
from drift_merge.reports.verdict import PUBLISHED, Verdict

Document = dict[str, Any]


def rounded(value: float | None) -> float | None:
    """A number with eight significant digits."""
    return None if value is None else float(f"{value:.8g}")


def describe_verdict(found: Verdict, layers: Sequence[float]) -> dict[str, Any]:
    """A verdict with the published pairs and the cosines of this pair's layers."""
    names = ("MathVista", "MathVision", "MathVerse")
    return {
        "label": found.label,
        "sentences": list(found.sentences),
        "cosine": rounded(found.cosine),
        "layers": [rounded(min(layers)), rounded(max(layers))] if layers else None,
        "published": [
            {
                "pair": pair,
                "low": low,
                "high": high,
                "change": dict(zip(names, points, strict=True)),
            }
            for pair, low, high, points in PUBLISHED
        ],
    }


def layer_cosines(tensors: Iterable[TensorFigures], part: str = PARTS[0]) -> list[float]:
    """The cosine of each layer of a part, all its tensors as one vector."""
    by_layer: dict[int, list[TensorFigures]] = {}
    for place, group in cells(tensors).items():
        if place.part == part and place.layer is not None:
            by_layer.setdefault(place.layer, []).extend(group.tensors)
    found = [Group(tuple(by_layer[layer])).cosine for layer in sorted(by_layer)]
    return [cosine for cosine in found if cosine is not None]


def describe_tensors(
    tensors: Sequence[TensorFigures],
    missing: Mapping[str, str],
    kinds: Sequence[FigureKind] = KINDS,
) -> Document:
    """Heat maps, the table by module, and the ten largest deltas.

    Args:
        tensors: in the order of a model.
        missing: key of a statistic -> why it is not known of any tensor.
        kinds: the statistics to show.
    """
    grouped = cells(tensors)
    maps = [_describe_map(kind, grouped.values(), missing.get(kind.key, "")) for kind in kinds]
    return {
        "maps": maps,
        "parts": [_describe_part(part, grouped, kinds) for part in _parts(grouped)],
        "modules": [_row(name, group) for name, group in modules(tensors).items()],
        "largest": [_row(t.name, Group((t,))) | {"shape": list(t.shape)} for t in largest(tensors)],
        "num_tensors": len(tensors),
        "num_nonfinite": Group(tuple(tensors)).num_unknown,
    }


def _parts(grouped: Mapping[Place, Group]) -> list[str]:
    return list(dict.fromkeys(place.part for place in grouped))


def _describe_map(kind: FigureKind, groups: Iterable[Group], missing: str) -> dict[str, Any]:
    plain = {"key": kind.key, "label": kind.label, "meaning": kind.meaning, "share": kind.is_share}
    scale = scale_of(groups, kind.key)
    if scale is None:
        reason = missing or "Not known of any tensor: NaN or Inf, or all zero."
        return plain | {"missing": reason, "low": None, "high": None, "clips": [False, False]}
    ends = {"low": rounded(scale.low), "high": rounded(scale.high)}
    return plain | {"missing": "", **ends, "clips": [scale.has_lower, scale.has_higher]}


def _describe_part(
    part: str, grouped: Mapping[Place, Group], kinds: Sequence[FigureKind]
) -> dict[str, Any]:
    own = {place: group for place, group in grouped.items() if place.part == part}
    return {
        "part": part,
        "layers": list(dict.fromkeys(p.layer for p in own if p.layer is not None)),
        "kinds": kinds_of(own),
        "cells": [
            {
                "layer": place.layer,
                "kind": place.kind,
                "name": group.tensors[0].name,
                "count": len(group.tensors),
                "shape": list(group.tensors[0].shape),
                "nonfinite": group.num_unknown,
                "values": {kind.key: rounded(getattr(group, kind.key)) for kind in kinds},
            }
            for place, group in own.items()
        ],
    }


_COLUMNS = ("norm_delta", "relative_norm", "cosine", "equal", "max_abs_delta")


def _row(name: str, group: Group) -> dict[str, Any]:
    figures = {key: rounded(getattr(group, key)) for key in _COLUMNS}
    return {"name": name, "count": len(group.tensors), "numel": group.numel} | figures


def describe_findings(found: Iterable[Finding | Mapping[str, str]]) -> list[dict[str, str]]:
    """Findings, the grave ones first."""
    order = ("error", "warning", "info")
    keys = ("severity", "code", "message", "remedy")
    plain = [
        {key: f[key] if isinstance(f, Mapping) else getattr(f, key) for key in keys} for f in found
    ]
    return sorted(plain, key=lambda finding: order.index(finding["severity"]))
