"""Where the mllm of a merge is now, and whether it is the one that the manifest means."""

from pathlib import Path

from drift_merge.errors import VerificationError
from drift_merge.merges.manifest import Merge
from drift_merge.reports.compare import Comparison, by_stored_name
from drift_merge.storage import fingerprints


def mllm_of(merge: Merge) -> str | None:
    """The mllm's path, if the manifest gives one that is there; a Hub id is not fetched unasked."""
    source = merge.manifest["sources"]["mllm"]
    if source["repo_id"]:
        return None
    path = Path(source["source"]).expanduser()
    return str(path) if path.exists() else None


def require_mllm(merge: Merge, comparison: Comparison) -> None:
    """Refuse another model than the mllm of the manifest.

    Raises:
        VerificationError: its tensors have other names or shapes, or one that the merge has
            copied differs.
    """
    found = comparison.plan.prepared.mllm
    label = found.source.given
    remedy = "Name the mllm that the merge was made of: --mllm SOURCE"
    if fingerprints.of_layout(found) != merge.manifest["sources"]["mllm"]["layout"]:
        raise VerificationError(
            f"{label} is not the mllm of {merge.path}: its tensors have other names, shapes or "
            "dtypes.",
            remedy=remedy,
        )
    measured = by_stored_name(comparison)
    changed = [
        name
        for name, record in merge.tensors.items()
        if record["method"] == "copy" and name in measured and measured[name].norm_delta
    ]
    if changed:
        raise VerificationError(
            f"{label} is not the mllm of {merge.path}: {changed[0]} was copied from that, and "
            f"differs here ({len(changed):,} such tensors).",
            remedy=remedy,
        )
