"""The pages of a merge and of a comparison."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from drift_merge.merges.manifest import Merge
from drift_merge.names.modules import canonical_order
from drift_merge.reports.compare import Comparison, by_stored_name
from drift_merge.reports.figures import KINDS, OF_MERGES, FigureKind, Group, TensorFigures
from drift_merge.reports.pages.document import (
    Document,
    describe_findings,
    describe_tensors,
    describe_verdict,
    layer_cosines,
)
from drift_merge.reports.pages.priors import describe_coverage, given
from drift_merge.reports.places import PARTS, part_of
from drift_merge.reports.verdict import Verdict, verdict
from drift_merge.storage.sizes import in_words

_RANK_HINT = "Not asked for: --stable-rank"
_BASE_HINT = "Needs the common ancestor of both: --base BASE"


def describe_comparison(comparison: Comparison, command: Sequence[str]) -> Document:
    """What the page of a comparison shows.

    Args:
        comparison: made.
        command: the words that made it.
    """
    prepared = comparison.plan.prepared
    a, b = prepared.reasoners[0][0].source, prepared.mllm.source
    tower = Group(comparison.tower)
    sources = {"A": a, "B": b} | ({"base": prepared.base[0].source} if prepared.base else {})
    return {
        "kind": "comparison",
        "title": f"{a.label} compared with {b.label}",
        "formula": "delta = A - B",
        "names": {"A": a.label, "B": b.label},
        "verdict": describe_verdict(
            verdict(tower.cosine, tower.relative_norm), layer_cosines(comparison.tensors)
        ),
        "notes": parts_sentences(comparison.tensors),
        "histogram": _histogram(comparison),
        "findings": describe_findings(comparison.plan.findings),
        "coverage": [
            [status.replace("_", " "), len(names)]
            for status, names in comparison.plan.coverage().items()
        ],
        "facts": [[role, source.given] for role, source in sources.items()],
        "commands": [["Compare again", shlex.join(command)]],
        **describe_tensors(comparison.tensors, missing_of(comparison)),
    }


def missing_of(comparison: Comparison) -> dict[str, str]:
    """Why a statistic of a comparison is not known of any tensor."""
    has_base = comparison.plan.prepared.base is not None
    unmoved = "A and B have moved no entry of the base both."
    return {
        "sign_agreement": unmoved if has_base else _BASE_HINT,
        "stable_rank": _RANK_HINT,
    }


def parts_sentences(tensors: Sequence[TensorFigures]) -> list[str]:
    """One sentence for each part of the model that was compared."""
    found = []
    for part in PARTS:
        group = Group(tuple(t for t in tensors if t.part == part))
        if not group.tensors:
            continue
        changed = [t for t in group.tensors if t.norm_delta != 0.0]
        total = f"{len(group.tensors):,} tensors"
        if not changed:
            found.append(f"The {part}: equal in all {total}.")
        elif group.relative_norm is None:
            found.append(f"The {part}: {total}, whose difference is not finite or has no scale.")
        else:
            found.append(
                f"The {part}: {len(changed):,} of {total} differ; |delta| / |B| is "
                f"{group.relative_norm:.4g}."
            )
    return found


def _histogram(comparison: Comparison) -> dict[str, Any]:
    plain = {name: each.plain() for name, each in comparison.histograms.items()}
    return {"missing": "", "modules": plain}


def describe_merge(merge: Merge, comparison: Comparison | None, why_not: str = "") -> Document:
    """What the page of a merge shows.

    Args:
        merge: opened.
        comparison: of the merge with its mllm; None: the manifest alone is shown.
        why_not: why there is none.
    """
    manifest = merge.manifest
    tensors = merge_figures(merge, comparison)
    sources = manifest["sources"]
    names = " + ".join(source["label"] for source in sources["reasoners"])
    missing = {kind.key: why_not for kind in KINDS}
    if comparison is not None:
        missing = missing_of(comparison)
    missing |= {"weight": "This method has no weights.", "change_kept": "Nothing was rounded."}
    kinds: tuple[FigureKind, ...] = (*OF_MERGES, *KINDS)
    found = _verdict(manifest, comparison)
    return {
        "kind": "merge",
        "title": f"Merge ({manifest['method']}): {sources['mllm']['label']} with {names}",
        "formula": manifest["formula"],
        "names": {"A": "the merge", "B": "its mllm"},
        "verdict": describe_verdict(found, layer_cosines(tensors)),
        "notes": parts_sentences(comparison.tensors) if comparison else [why_not],
        "histogram": _histogram(comparison) if comparison else {"missing": why_not},
        "findings": describe_findings(manifest["findings"]),
        "coverage": [row for each in manifest["coverage"] for row in describe_coverage(each)],
        "facts": _facts(manifest, merge),
        "commands": _commands(merge),
        **describe_tensors(tensors, missing, kinds),
    }


def merge_figures(merge: Merge, comparison: Comparison | None = None) -> list[TensorFigures]:
    """What is known of every tensor of a merge: from its manifest, and measured."""
    measured = by_stored_name(comparison) if comparison else {}
    found = []
    for name, record in merge.tensors.items():
        if "second_name_of" in record:
            continue
        canonical = record.get("canonical", "")
        label = canonical or name
        part = part_of(name, is_tower=bool(canonical))
        module = record.get("module", "other") if canonical else part
        plain = TensorFigures(label, part, module, tuple(record["shape"]), None, None, None, None)
        weights = record.get("weights")
        found.append(
            replace(
                measured.get(name, plain),
                weight=sum(weights) if weights else None,
                change_kept=record.get("change_kept"),
            )
        )
    return sorted(found, key=lambda t: (PARTS.index(t.part), canonical_order(t.name)))


def _verdict(manifest: Mapping[str, Any], comparison: Comparison | None) -> Verdict:
    counts = ", ".join(f"{n:,} {method}" for method, n in manifest["counts"].items())
    kept = manifest["change_kept"]
    second = f"Its tensors: {counts}."
    if kept is not None:
        second = f"The output's dtype kept {kept:.0%} of the change; its tensors: {counts}."
    if comparison is None:
        return Verdict("A merge", ("What it changed was not measured.", second), None)
    tower = Group(comparison.tower)
    if tower.relative_norm is None or tower.cosine is None:
        return Verdict("A merge", ("What it changed is not finite, or has no scale.", second), None)
    first = (
        f"The merge moved the language tower by {tower.relative_norm:.2%} of its norm; its cosine "
        f"with the mllm is {tower.cosine:.4f}."
    )
    return Verdict("A merge", (first, second), tower.cosine)


def _facts(manifest: Mapping[str, Any], merge: Merge) -> list[list[str]]:
    sources, parameters = manifest["sources"], manifest["parameters"]
    rows = [["mllm", given(sources["mllm"])]]
    for source in sources["reasoners"]:
        weight = source.get("weight")
        rows.append(["reasoner", given(source) + ("" if weight is None else f", weight {weight}")])
    rows += [["base", given(sources["base"])]] if "base" in sources else []
    options = ", ".join(f"{k} {v}" for k, v in parameters["options"].items())
    rows += [["method", f"{manifest['method']} ({parameters['variant']})"]]
    rows += [["options", options]] if options else []
    tool = manifest["tool"]
    return [
        *rows,
        ["modules", str(parameters["modules"])],
        ["size", f"{len(merge.tensors):,} tensors, {in_words(manifest['size_bytes'])}"],
        ["made with", f"{tool['name']} {tool['version']}"],
    ]


def _commands(merge: Merge) -> list[list[str]]:
    sources, path = merge.manifest["sources"], str(merge.path)
    roles = [w for s in sources["reasoners"] for w in ("--reasoner", given(s))]
    roles += ["--mllm", given(sources["mllm"])]
    roles += ["--base", given(sources["base"])] if "base" in sources else []
    again = shlex.join(["drift-merge", "run", f"{path}/drift_merge.json", "-o", "again/"])
    return [
        ["Make it again", again],
        ["Check it", shlex.join(["drift-merge", "verify", path, *roles])],
        ["Compare", shlex.join(["drift-merge", "compare", path, given(sources["mllm"])])],
    ]
