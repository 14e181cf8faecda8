"""`prior.json`: everything a user needs to trust a prior, as plain data.

Raw deltas are stored; the norms here let training rescale them by one multiplication. The
manifest depends on the recipe and the inputs alone: no time, no host, no thread count.
"""

from dataclasses import dataclass
from math import prod
from pathlib import Path
from shlex import quote
from typing import Any

from drift_merge.artifacts.describe import (
    describe_coverage,
    describe_index,
    describe_second_names,
    describe_source,
    read_fingerprints,
    recorded_findings,
)
from drift_merge.artifacts.verify import Artifact
from drift_merge.errors import CheckpointError, RecipeError, SourceError
from drift_merge.maths.spectra.matrices import Matrix
from drift_merge.plans.plan import Plan, Step, matrix_at, place_of
from drift_merge.plans.prepare import Prepared
from drift_merge.plans.projections import is_attention_stack, projections
from drift_merge.storage.checkpoint import Checkpoint, open_prior_checkpoint
from drift_merge.storage.forms.compressed import describe_stored
from drift_merge.storage.forms.factored import places_of, whole_place
from drift_merge.storage.manifests import describe_tool, read_manifest, seal
from drift_merge.storage.measured import Results, TensorRecord

MANIFEST = "prior.json"
FORMAT_VERSION = 1
FORMULA = "delta = theta_reasoner - theta_mllm"
FORMULA_WITH_BASE = "delta = theta_reasoner - theta_base"
SIGN = (
    "Adding delta moves the mllm towards the reasoner. "
    "Training subtracts alpha * delta from the gradient, so that descent does the same."
)


@dataclass(frozen=True, slots=True)
class Prior(Artifact):
    """A prior on disk; its tensors are deltas, by canonical name."""

    def norm(self, name: str) -> float | None:
        """The L2 norm of a delta as it is stored; None where it held NaN or Inf."""
        entry = self.tensors[name]
        return entry.get("norm_stored", entry["norm_delta"])


def build_manifest(prepared: Prepared, plan: Plan, results: Results) -> dict[str, Any]:
    """The content of `prior.json`."""
    reasoner, alignment = prepared.reasoners[0]
    sources = {
        "reasoner": describe_source(reasoner, read_fingerprints(results, "fingerprint_reasoner")),
        "mllm": describe_source(prepared.mllm, read_fingerprints(results, "fingerprint_mllm")),
    }
    if prepared.base is not None:
        read = read_fingerprints(results, "fingerprint_base")
        sources["base"] = describe_source(prepared.base[0], read)
    manifest = {
        "format_version": FORMAT_VERSION,
        "kind": "drift-prior",
        "formula": FORMULA_WITH_BASE if prepared.base else FORMULA,
        "sign": SIGN,
        "tool": describe_tool(),
        "parameters": prepared.recipe.parameters(),
        "sources": sources,
        "coverage": describe_coverage(alignment) | _missing_in_base(prepared, plan),
        **describe_second_names([alignment]),
        "findings": recorded_findings(prepared.findings),
        "num_elements": sum(prod(step.shape) for step in plan.steps),
        "size_bytes": plan.write_bytes,
        "shards": [shard.file for shard in plan.layout.shards],
        "index": describe_index(plan),
        "tensors": {step.name: _record(step, results[step.name]) for step in plan.steps},
    }
    return seal(manifest)


def _missing_in_base(prepared: Prepared, plan: Plan) -> dict[str, int]:
    """Matched tensors without a delta, because the base has no partner (on_mismatch skip)."""
    if prepared.base is None:
        return {}
    return {"missing_in_base": len(prepared.reasoners[0][1].pairs) - len(plan.steps)}


def _record(step: Step, measured: TensorRecord) -> TensorRecord:
    """What is recorded of one delta."""
    reasoner = step.inputs[1]
    record: TensorRecord = {
        "reasoner": sorted({part.name for part in reasoner.parts}),
        "mllm": step.inputs[0].parts[0].name,
        "module": step.module,
        "shape": list(step.shape),
        "dtype": step.dtype,
    }
    record.update(stored_form(step))
    if reasoner.rows is not None:
        record["rows_matched"] = reasoner.rows.num_matched
        record["rows_unmatched"] = reasoner.rows.num_unmatched
        if reasoner.rows.num_unexplained:
            record["rows_unexplained"] = reasoner.rows.num_unexplained
    record.update(of_delta(measured))
    record["dtype_mllm"] = record.pop("dtype_mllm")  # these two come last
    record["sample_mllm"] = record.pop("sample_mllm")
    return record


def stored_form(step: Step) -> TensorRecord:
    """How a delta is stored, where not as it is; and where its matrices lie, if it has several."""
    found = TensorRecord()
    if step.scale:
        found["scale"] = step.scale
    if step.rank:
        found["rank"] = step.rank
    places = [place_of(matrix) for matrix in step.matrices]
    if places and places != [whole_place(step.shape)]:
        found["places"] = [place.text() for place in places]
    return found


def matrices_of(name: str, entry: TensorRecord, prior: Prior) -> tuple[Matrix, ...]:
    """Where the matrices of a delta lie; () for a vector, an embedding or a head.

    Raises:
        RecipeError: it fuses q, k and v, and the manifest is too old to say where they lie.
    """
    if "places" in entry:
        return tuple(map(matrix_at, places_of(entry)))
    shapes = {other: tuple(found["shape"]) for other, found in prior.tensors.items()}
    if is_attention_stack(name):
        raise RecipeError(
            f"{prior.path} does not say where q, k and v lie in {name}.",
            remedy="Compute the prior again with this version: drift-prior compute",
        )
    return projections(name, str(entry["module"]), shapes[name], {}, shapes)


def of_delta(measured: TensorRecord) -> TensorRecord:
    """What was measured of a tensor that is a delta: its fingerprint has a name of its own."""
    record: TensorRecord = {**measured, "fingerprint_delta": measured["fingerprint"]}
    del record["fingerprint"]
    return record


def open_prior(path: Path) -> Prior:
    """Open a prior by its manifest.

    Raises:
        SourceError: there is no prior at `path`.
        CheckpointError: its manifest is broken, or of a newer format.
    """
    file = path / MANIFEST
    if not file.is_file():
        raise SourceError(
            f"{path} is not a prior: it has no {MANIFEST}.",
            remedy="Make one with: drift-prior compute REASONER MLLM -o PRIOR",
        )
    manifest = read_manifest(file, kind="drift-prior", format_version=FORMAT_VERSION)
    return Prior(path, manifest)


def open_shards(prior: Prior) -> Checkpoint:
    """The headers of a prior's shards, equal to what its manifest says; no tensor data is read.

    Raises:
        CheckpointError: a shard is missing or broken, or of another run.
    """
    deltas = open_prior_checkpoint(str(prior.path))
    expected = describe_stored(prior.tensors)
    found = {
        name: (info.dtype, info.shape)
        for name, info in deltas.tensors.items()
        if name not in deltas.factors
    }
    names = sorted(expected.keys() | found.keys())
    for name in (name for name in names if expected.get(name) != found.get(name)):
        ours, theirs = (
            "nothing" if name not in side else f"{side[name][0]} {side[name][1]}"
            for side in (found, expected)
        )
        raise CheckpointError(
            f"{prior.path}: {name} is {ours} in the shards, but the manifest says {theirs}.",
            remedy="They are of different runs; make or download the prior again after a look: "
            f"drift-prior verify {quote(str(prior.path))}",
        )
    return deltas
