"""`drift_merge.json`: how a merged checkpoint was made, tensor by tensor."""

from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from typing import Any

from drift_merge.artifacts.describe import (
    describe_coverage,
    describe_index,
    describe_rows,
    describe_second_names,
    describe_source,
    read_fingerprints,
    recorded_findings,
)
from drift_merge.artifacts.verify import Artifact
from drift_merge.errors import SourceError
from drift_merge.plans.plan import Plan
from drift_merge.plans.prepare import Prepared
from drift_merge.recipes.directions import in_words
from drift_merge.recipes.recipe import Recipe, method_of, method_options, method_variant
from drift_merge.recipes.words import NEAREST
from drift_merge.storage.manifests import describe_tool, read_manifest, seal
from drift_merge.storage.measured import Results, TensorRecord

MANIFEST = "drift_merge.json"
FORMAT_VERSION = 1


@dataclass(frozen=True, slots=True)
class Merge(Artifact):
    """A merged checkpoint on disk."""


def build_manifest(
    prepared: Prepared, plan: Plan, results: Results, sidecars: dict[str, str]
) -> dict[str, Any]:
    """The content of `drift_merge.json`.

    Args:
        prepared: the opened sources.
        plan: what was done.
        results: what was measured, by output tensor.
        sidecars: fingerprint of every file beside the weights, by name.
    """
    reasoners = []
    weighted = zip(prepared.reasoners, prepared.recipe.parsed_weights, strict=True)
    for index, ((checkpoint, _), weight) in enumerate(weighted, start=1):
        source = describe_source(checkpoint, _reasoner_data(plan, results, index))
        reasoners.append({**source, "weight": weight.plain})
    mllm = read_fingerprints(results, "fingerprint_mllm")
    sources: dict[str, Any] = {"reasoners": reasoners}
    sources["mllm"] = {**describe_source(prepared.mllm, mllm), "weight": _mllm_weight(prepared)}
    if prepared.base is not None:
        read = read_fingerprints(results, "fingerprint_base")
        sources["base"] = describe_source(prepared.base[0], read)
    manifest = {
        "format_version": FORMAT_VERSION,
        "kind": "drift-merge",
        "method": prepared.recipe.method,
        "formula": f"theta = {_formula(prepared.recipe)}",
        "tool": describe_tool(),
        "parameters": prepared.recipe.parameters(),
        "sources": sources,
        "coverage": [describe_coverage(alignment) for _, alignment in prepared.reasoners],
        **describe_second_names(alignment for _, alignment in prepared.reasoners),
        "findings": recorded_findings(prepared.findings),
        "counts": plan.counts(),
        **_rounding(plan, results),
        "size_bytes": plan.write_bytes,
        "shards": [shard.file for shard in plan.layout.shards],
        "index": describe_index(plan),
        "sidecars": sidecars,
        "tensors": _tensors(plan, results, has_mllm_weight=_has_mllm_weight(prepared.recipe)),
    }
    if prepared.mllm.folder.left_out:
        manifest["left_out"] = {
            name: {"reason": found.reason, "files": found.num_files, "bytes": found.size_bytes}
            for name, found in prepared.mllm.folder.left_out.items()
        }
    return seal(manifest)


def _formula(recipe: Recipe) -> str:
    method = method_of(recipe)
    return "; ".join(filter(None, (method.formula, in_words(method, method_options(recipe)))))


def _mllm_weight(prepared: Prepared) -> float | str | None:
    """The mllm's own weight where the method has one; else what is left, if that is one number."""
    recipe = prepared.recipe
    if _has_mllm_weight(recipe):
        return recipe.parsed_mllm_weight.plain
    weights = [weight.plain for weight in recipe.parsed_weights]
    if recipe.method != "linear" or not all(isinstance(w, float) for w in weights):
        return None
    return round(1.0 - sum(float(w) for w in weights), 12)


def _has_mllm_weight(recipe: Recipe) -> bool:
    return "mllm_weight" in method_of(recipe).defaults[method_variant(recipe)]


def _reasoner_data(plan: Plan, results: Results, source: int) -> dict[str, str]:
    found = {}
    for step in plan.steps:
        read = results[step.name].get("fingerprint_reasoners", [])
        for view, fingerprint in zip(step.inputs[1 : 1 + len(read)], read, strict=True):
            if view.source == source:
                found[step.name] = fingerprint
    return found


def _rounding(plan: Plan, results: Results) -> dict[str, float | None]:
    """The fraction of the change that rounding kept, over all merged tensors by their size.

    Of stochastic rounding also its standard error, and the noise that it has added, relative to
    the change.
    """
    found = [
        (plan.layout.tensors[name].numel, result)
        for name, result in results.items()
        if result.get("change_kept") is not None
    ]
    total = sum(numel for numel, _ in found)
    if not total:
        return {"change_kept": None}
    kept = sum(numel * float(result["change_kept"] or 0.0) for numel, result in found) / total
    if plan.recipe.round == NEAREST:
        return {"change_kept": kept}
    errors = (numel / total * result["change_kept_error"] for numel, result in found)
    noise = sum(numel * result["rounding_noise"] for numel, result in found) / total
    error = sqrt(sum(error**2 for error in errors))
    return {"change_kept": kept, "change_kept_error": error, "rounding_noise": noise}


def _tensors(plan: Plan, results: Results, *, has_mllm_weight: bool) -> dict[str, TensorRecord]:
    tensors = {}
    for step in plan.steps:
        record = TensorRecord(method=step.method, dtype=step.dtype, shape=list(step.shape))
        if step.canonical:
            record["canonical"], record["module"] = step.canonical, step.module
        if step.second_name_of:
            record["second_name_of"] = step.second_name_of
        if step.weights:
            parts = (view.parts for view in step.inputs[1 : 1 + len(step.weights)])
            record["weights"] = list(step.weights)
            if has_mllm_weight:
                record["mllm_weight"] = step.mllm_weight
            record["reasoners"] = [sorted({part.name for part in some}) for some in parts]
            record.update(describe_rows(step))
        record.update(results[step.name])
        tensors[step.name] = record
    return tensors


def open_merge(path: Path) -> Merge:
    """Open a merged checkpoint by its manifest.

    Raises:
        SourceError: there is none at `path`.
        CheckpointError: its manifest is broken, or of a newer format.
    """
    file = path / MANIFEST
    if not file.is_file():
        raise SourceError(
            f"{path} is not a merge of this tool: it has no {MANIFEST}.",
            remedy="Make one with: drift-merge linear REASONER MLLM -o OUT",
        )
    return Merge(path, read_manifest(file, kind="drift-merge", format_version=FORMAT_VERSION))
