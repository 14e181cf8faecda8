"""Reads and writes manifests, and finds any change made to one or to the files it vouches for.

A manifest holds a seal, the fingerprint of all its other entries, and a fingerprint of every small
file beside the shards. The card is not among them: people may edit it.
"""

import json
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from drift_merge.errors import CheckpointError, VerificationError
from drift_merge.storage import fingerprints
from drift_merge.storage.listed import listed_files

TOOL = f"drift_merge {version('drift_merge')}"


_SEAL = "seal"


def seal(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest with a last entry `seal`: the fingerprint of all the others."""
    return {**manifest, _SEAL: fingerprints.of_json(manifest)}


def reseal(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """A manifest that has been changed on purpose, with a seal of its present content."""
    return seal({key: value for key, value in manifest.items() if key != _SEAL})


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
        found = fingerprints.of_file(path)
        if found != fingerprint:
            raise VerificationError(
                f"{name} in {directory} was changed: expected {fingerprint}, got {found}.",
                remedy=remedy,
            )


def describe_tool() -> dict[str, str]:
    """Name and version of what made the output."""
    name, version = TOOL.split()
    return {"name": name, "version": version}


def to_json(manifest: dict[str, Any]) -> bytes:
    """The bytes of a manifest: readable, and equal for equal content."""
    return (json.dumps(manifest, indent=1, allow_nan=False) + "\n").encode()


def read_record(
    file: Path, *, kind: str, version: int, key: str = "format_version"
) -> dict[str, Any]:
    """Read a JSON object of ours and check that it is of a kind and a version.

    Args:
        file: to read.
        kind: as it says of itself.
        version: the one that this program reads.
        key: where the object says its own.

    Raises:
        CheckpointError: broken JSON, another kind, or another version.
    """
    try:
        manifest = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{file} cannot be read: {error}.", remedy="Make or download the directory again."
        ) from error
    if not isinstance(manifest, dict) or manifest.get("kind") != kind:
        found = manifest.get("kind") if isinstance(manifest, dict) else type(manifest).__name__
        raise CheckpointError(
            f"{file} is of the kind {found!r}; expected {kind!r}.",
            remedy="Give the directory that this tool has written.",
        )
    if manifest.get(key) != version:
        raise CheckpointError(
            f"{file} has format version {manifest.get(key)}; this version reads {version}.",
            remedy="Upgrade: pip install -U drift_merge",
        )
    return manifest


def read_manifest(file: Path, *, kind: str, format_version: int) -> dict[str, Any]:
    """Read the manifest of an artifact and check that it is one.

    Raises:
        CheckpointError: see `read_record`; an entry is missing, or a file lies outside its folder.
        VerificationError: it was changed after it was written.
    """
    manifest = read_record(file, kind=kind, version=format_version)
    wanted = ("tensors", "sources", "parameters", "shards", "coverage", "findings")
    missing = [key for key in wanted if key not in manifest]
    if missing or not isinstance(manifest["tensors"], dict):
        raise CheckpointError(
            f"{file} lacks {', '.join(missing) or 'its table of tensors'}.",
            remedy="Make or download the directory again.",
        )
    listed_files(manifest, where=str(file))
    if _SEAL in manifest:  # those of the first versions have none
        check_seal(manifest, file)
    return manifest
