"""Manifests: what an output says of where it comes from, and how that is read again.

A manifest depends on the recipe and the inputs alone: no time, no host, no thread count.
"""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from drift_merge.engine.plan import TOOL
from drift_merge.errors import CheckpointError
from drift_merge.names.tensors import Alignment, Finding
from drift_merge.storage import fingerprints
from drift_merge.storage.checkpoint import Checkpoint
from drift_merge.storage.journal import Results


def describe_source(checkpoint: Checkpoint, tensors: dict[str, str]) -> dict[str, Any]:
    """A source for a manifest: where it is, which revision, and fingerprints of what was read.

    Args:
        checkpoint: the source.
        tensors: fingerprints of the tensors read from it, by output tensor.
    """
    source = checkpoint.source
    return {
        "source": source.given,
        "label": source.label,
        "repo_id": source.repo_id,
        "revision": source.revision,
        "config": fingerprints.of_json(checkpoint.config),
        "layout": fingerprints.of_layout(checkpoint),
        "num_tensors": len(checkpoint.tensors),
        "tensors_read": len(tensors),
        "data": fingerprints.combine(tensors),
    }


def describe_findings(findings: Sequence[Finding]) -> list[dict[str, str]]:
    """Findings as plain data."""
    return [
        {"code": f.code, "severity": f.severity, "message": f.message, "remedy": f.remedy}
        for f in findings
    ]


def describe_coverage(alignment: Alignment) -> dict[str, Any]:
    """How much of what was selected is matched, and the number of records of every status."""
    counts = Counter(record.status for record in alignment.records)
    return {
        "selected": alignment.num_selected,
        "matched": alignment.num_matched,
        "records": dict(sorted(counts.items())),
    }


def describe_tool() -> dict[str, str]:
    """Name and version of what made the output."""
    name, version = TOOL.split()
    return {"name": name, "version": version}


def read_fingerprints(results: Results, key: str) -> dict[str, str]:
    """The fingerprints of one input, by output tensor."""
    return {name: result[key] for name, result in results.items() if key in result}


def to_json(manifest: dict[str, Any]) -> bytes:
    """The bytes of a manifest: readable, and equal for equal content."""
    return (json.dumps(manifest, indent=1, allow_nan=False) + "\n").encode()


def read_manifest(file: Path, *, kind: str, format_version: int) -> dict[str, Any]:
    """Read a manifest of ours and check that it is one.

    Raises:
        CheckpointError: broken JSON, another kind, or a newer format version.
    """
    try:
        manifest = json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{file} cannot be read: {error}.", remedy="Make or download the directory again."
        ) from error
    if not isinstance(manifest, dict) or manifest.get("kind") != kind:
        found = manifest.get("kind") if isinstance(manifest, dict) else type(manifest).__name__
        raise CheckpointError(
            f"{file} is of the kind {found!r}; expected {kind!r}.",
            remedy="Give the directory that this tool has written.",
        )
    if manifest.get("format_version") != format_version:
        raise CheckpointError(
            f"{file} has format version {manifest.get('format_version')}; "
            f"this version reads {format_version}.",
            remedy="Upgrade: pip install -U drift_merge",
        )
    wanted = ("tensors", "sources", "parameters", "shards", "coverage", "findings")
    missing = [key for key in wanted if key not in manifest]
    if missing or not isinstance(manifest["tensors"], dict):
        raise CheckpointError(
            f"{file} lacks {', '.join(missing) or 'its table of tensors'}.",
            remedy="Make or download the directory again.",
        )
    return manifest
