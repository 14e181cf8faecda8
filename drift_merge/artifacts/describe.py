"""The parts of a manifest that priors and merges share: sources, findings, coverage, index.

A manifest depends on the recipe and the inputs alone: no time, no host, no thread count.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from drift_merge.names.tensors import Alignment, Finding
from drift_merge.plans.plan import Plan, Step
from drift_merge.storage import fingerprints
from drift_merge.storage.checkpoint import Checkpoint
from drift_merge.storage.measured import Results, SourceKey, TensorRecord


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
        "data": fingerprints.of_fingerprints(tensors),
    }


# They say whether data was compared, which --stream does not; what follows is recorded by itself.
_OF_THE_DATA = ("second_names", "copies_apart")


def describe_findings(findings: Sequence[Finding]) -> list[dict[str, str]]:
    """Findings as plain data."""
    return [
        {"code": f.code, "severity": f.severity, "message": f.message, "remedy": f.remedy}
        for f in findings
    ]


def recorded_findings(findings: Sequence[Finding]) -> list[dict[str, str]]:
    """The findings of a manifest, which is the same however the sources are read."""
    return describe_findings([f for f in findings if f.code not in _OF_THE_DATA])


def describe_coverage(alignment: Alignment) -> dict[str, Any]:
    """How much of what was selected is matched, and the number of records of every status."""
    counts = Counter(record.status for record in alignment.records)
    return {
        "selected": alignment.num_selected,
        "matched": alignment.num_matched,
        "records": dict(sorted(counts.items())),
    }


def describe_second_names(alignments: Iterable[Alignment]) -> dict[str, dict[str, list[str]]]:
    """`second_names`: stored name of a parameter of the mllm -> its other ones; {} without any."""
    found = {name: list(rest) for a in alignments for name, rest in a.second_names.items()}
    return {"second_names": found} if found else {}


def describe_rows(step: Step) -> TensorRecord:
    """How many rows of a vocabulary each input after the mllm's has; {} where all have all."""
    maps = [view.rows for view in step.inputs[1:]]
    if not any(maps):
        return {}
    total = step.shape[0] if step.shape else 0
    matched = [rows.num_matched if rows else total for rows in maps]
    return {
        "rows_matched": matched,
        "rows_unmatched": [total - count for count in matched],
        "rows_unexplained": max(rows.num_unexplained for rows in maps if rows),
    }


def read_fingerprints(results: Results, key: SourceKey) -> dict[str, str]:
    """The fingerprints of one input, by output tensor."""
    return {name: result[key] for name, result in results.items() if key in result}


def describe_index(plan: Plan) -> dict[str, str]:
    """Fingerprint of the index file, by its name; empty where the output needs no index."""
    if plan.layout.index is None:
        return {}
    name, data = plan.layout.index
    return {name: fingerprints.of_bytes(data)}
