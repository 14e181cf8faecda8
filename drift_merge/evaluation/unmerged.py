"""Which MLLM a merge was made of: what its manifest says, where that can be found from here."""

from pathlib import Path

from drift_merge.errors import SourceError
from drift_merge.merges.manifest import open_merge


def unmerged_of(merge: Path) -> str | None:
    """The MLLM of a merge: its id and commit, or a directory of its name here or beside the merge.

    None where the folder is no merge, or names a directory that is not to be found.
    """
    try:
        mllm = open_merge(merge).manifest["sources"]["mllm"]
    except SourceError:
        return None
    if mllm["repo_id"]:
        return f"{mllm['repo_id']}@{mllm['revision']}"
    for folder in (Path(), merge.absolute().parent):
        found = folder / str(mllm["label"])
        if (found / "config.json").is_file():
            return str(found)
    return None
