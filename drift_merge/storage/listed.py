"""Which files a manifest vouches for, none of them outside its own folder."""

from collections.abc import Mapping
from typing import Any

from drift_merge.errors import CheckpointError


def listed_files(manifest: Mapping[str, Any], *, where: str) -> list[str]:
    """The files that a manifest vouches for: shards, index, sidecars. The manifest not included.

    Raises:
        CheckpointError: the manifest names a file outside its own directory.
    """
    names: list[object] = []
    for key in ("shards", "index", "sidecars"):
        found = manifest.get(key) or ()
        names += found if isinstance(found, list | tuple | dict) else [found]
    for name in names:
        if not isinstance(name, str) or not _is_plain(name):
            raise CheckpointError(
                f"{where} names {name!r}, which is not a plain path below its own directory.",
                remedy="No honest manifest does this. Find out who made it before you use it.",
            )
    return [str(name) for name in names]


def _is_plain(name: str) -> bool:
    parts = name.split("/")
    return name.isprintable() and "\\" not in name and not {"", ".", ".."} & set(parts)
