"""The page of a sweep: its outputs side by side, and what each changed where that was measured."""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from drift_merge.errors import SourceError
from drift_merge.merges.manifest import MANIFEST, Merge, open_merge
from drift_merge.reports.compare import Comparison
from drift_merge.reports.figures import Group, modules
from drift_merge.reports.pages.document import Document, rounded
from drift_merge.reports.places import LANGUAGE
from drift_merge.storage.sizes import in_words


def open_sweep(path: Path) -> list[Merge]:
    """The merges directly below a directory, by name.

    Raises:
        SourceError: there are none.
        CheckpointError: a manifest is broken.
    """
    found = [open_merge(file.parent) for file in sorted(path.glob(f"*/{MANIFEST}"))]
    if not found:
        raise SourceError(
            f"{path} is no merge, and holds none: no {MANIFEST} in it or below.",
            remedy="Make a sweep with: drift-merge sweep recipe.yaml --set weight=0.1,0.2 -o OUT",
        )
    return sorted(found, key=lambda merge: tuple(_settings(merge).items()))


def _settings(merge: Merge) -> dict[str, Any]:
    """All that a sweep can vary, numbers before words."""
    manifest = merge.manifest
    weights = [source.get("weight") for source in manifest["sources"]["reasoners"]]
    found: dict[str, Any] = {}
    for number, weight in enumerate(weights, start=1):
        found["weight" if len(weights) == 1 else f"weight {number}"] = weight
    parameters = manifest["parameters"]
    found |= parameters["options"]
    plain = {k: v for k, v in parameters.items() if isinstance(v, str | int | float | bool)}
    return found | plain


def describe_sweep(
    path: Path, merges: Sequence[Merge], measured: Mapping[str, Comparison], why_not: str
) -> Document:
    """What the page of a sweep shows.

    Args:
        path: of the sweep.
        merges: of `open_sweep`.
        measured: by directory name, what each changed of its mllm; {} where it was not measured.
        why_not: why it was not.
    """
    settings = [_settings(merge) for merge in merges]
    names = [key for key in settings[0] if len({repr(s.get(key)) for s in settings}) > 1]
    rows = [_row(m, s, names, measured) for m, s in zip(merges, settings, strict=True)]
    numbers = [n for n in names if all(isinstance(s.get(n), int | float) for s in settings)]
    x = numbers[0] if len(names) == 1 and numbers else ""
    sources = merges[0].manifest["sources"]
    return {
        "kind": "sweep",
        "title": f"Sweep: {path.resolve().name}",
        "formula": merges[0].manifest["formula"],
        "notes": [f"{len(merges):,} merges; they differ in: {', '.join(names) or 'nothing'}."],
        "panels": _panels(merges, settings, measured, x, why_not),
        "x_label": x or "number of the output",
        "table": {
            "columns": ["output", *names, "relative norm", "cosine", "change kept", "size"],
            "rows": rows,
        },
        "facts": [
            ["mllm", str(sources["mllm"]["source"])],
            *(["reasoner", str(source["source"])] for source in sources["reasoners"]),
        ],
        "commands": _commands(merges[0]),
    }


def _commands(first: Merge) -> list[list[str]]:
    again = ["drift-merge", "run", f"{first.path}/{MANIFEST}", "-o", "again/"]
    merge = ["drift-merge", "report", str(first.path), "-o", "merge.html"]
    return [["Make one of them again", shlex.join(again)], ["See one by layer", shlex.join(merge)]]


def _tower(comparison: Comparison | None) -> Group:
    return Group(comparison.tower if comparison else ())


def _row(
    merge: Merge,
    settings: Mapping[str, Any],
    names: Sequence[str],
    measured: Mapping[str, Comparison],
) -> list[Any]:
    tower = _tower(measured.get(merge.path.name))
    kept = merge.manifest["change_kept"]
    return [
        merge.path.name,
        *(settings.get(name) for name in names),
        rounded(tower.relative_norm),
        rounded(tower.cosine),
        rounded(kept),
        in_words(merge.manifest["size_bytes"]),
    ]


def _panels(
    merges: Sequence[Merge],
    settings: Sequence[Mapping[str, Any]],
    measured: Mapping[str, Comparison],
    x: str,
    why_not: str,
) -> list[dict[str, Any]]:
    """Curves over the setting that varies, or over the outputs by number."""
    kept: list[list[float | None]] = []
    norms: dict[str, list[list[float | None]]] = {}
    cosines: dict[str, list[list[float | None]]] = {}
    for number, (merge, setting) in enumerate(zip(merges, settings, strict=True), start=1):
        at = float(setting[x]) if x else float(number)
        kept.append([at, rounded(merge.manifest["change_kept"])])
        comparison = measured.get(merge.path.name)
        rows = modules([t for t in comparison.tensors if t.part == LANGUAGE]) if comparison else {}
        for name, group in rows.items():
            norms.setdefault(name, []).append([at, rounded(group.relative_norm)])
            cosines.setdefault(name, []).append([at, rounded(group.cosine)])
    return [
        _panel("relative_norm", "Relative norm", "|merge - mllm| / |mllm|", norms, why_not),
        _panel("cosine", "Cosine with the mllm", "cos(merge, mllm)", cosines, why_not),
        _panel("change_kept", "Change kept by the dtype", "fraction", {"all": kept}, "")
        | {"least": 0.02},
    ]


def _panel(
    key: str, label: str, unit: str, series: Mapping[str, list[list[float | None]]], why_not: str
) -> dict[str, Any]:
    shown = [{"name": name, "points": points} for name, points in series.items()]
    missing = "" if shown else why_not
    return {"key": key, "label": label, "unit": unit, "missing": missing, "series": shown}
