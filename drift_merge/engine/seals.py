"""Seals: what lets `verify` find a change in a manifest or in a small file beside the shards.

A manifest holds a fingerprint of all its other entries, and one of every file that it vouches
for. The card is not among them: people may edit it.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from drift_merge.engine.plan import Plan
from drift_merge.errors import VerificationError
from drift_merge.storage import fingerprints

_SEAL = "seal"


def seal(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest with a last entry `seal`: the fingerprint of all the others."""
    return {**manifest, _SEAL: fingerprints.of_json(manifest)}


def describe_index(plan: Plan) -> dict[str, str]:
    """Fingerprint of the index file, by its name; empty where the output needs no index."""
    if plan.layout.index is None:
        return {}
    name, data = plan.layout.index
    return {name: fingerprints.of_bytes(data)}


def check_seal(manifest: Mapping[str, Any], file: Path) -> None:
    """Refuse a manifest that was changed after it was written.

    Raises:
        VerificationError: naming the file.
    """
    rest = {key: value for key, value in manifest.items() if key != _SEAL}
    found = fingerprints.of_json(rest)
    if found != manifest.get(_SEAL):
        raise VerificationError(
            f"{file} was changed after it was written: expected {manifest.get(_SEAL)}, "
            f"got {found}.",
            remedy="Make or download the directory again.",
        )


def check_beside(directory: Path, expected: Mapping[str, str], *, remedy: str) -> None:
    """Compare small files with their fingerprints.

    Args:
        directory: of the artifact.
        expected: fingerprint by relative path.
        remedy: the way out when one is missing or differs.

    Raises:
        VerificationError: naming the first file that is missing or differs.
    """
    for name, fingerprint in expected.items():
        path = directory / name
        if not path.is_file():
            raise VerificationError(f"{name} is missing from {directory}.", remedy=remedy)
        found = fingerprints.of_bytes(path.read_bytes())
        if found != fingerprint:
            raise VerificationError(
                f"{name} in {directory} was changed: expected {fingerprint}, got {found}.",
                remedy=remedy,
            )
