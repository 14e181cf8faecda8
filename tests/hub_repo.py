"""The repositories of a `HubServer`: commits over local files, and what its API says of them."""

import hashlib
from dataclasses import dataclass, field
from pathlib import Path

LARGE_SUFFIXES = (".safetensors", ".bin", ".gguf")  # files that the Hub keeps in LFS


@dataclass
class Repo:
    """One repository: commits are maps from path to a local file, refs name commits."""

    repo_id: str
    commits: dict[str, dict[str, Path]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    private: bool = False  # everything needs a token
    gated: bool = False  # the listing is public, files need a token with access

    def add_commit(self, folder: Path, ref: str) -> str:
        """Make the folder's files the newest commit of a branch (or tag); return its hash."""
        files = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file()}
        commit = hashlib.sha1(f"{self.repo_id} {len(self.commits)}".encode()).hexdigest()
        self.commits[commit] = dict(sorted(files.items()))
        self.refs[ref] = commit
        return commit


def is_large(path: Path) -> bool:
    """Whether the Hub would keep the file in LFS and serve it from the CDN."""
    return path.name.endswith(LARGE_SUFFIXES)


def info(repo_id: str, commit: str, files: dict[str, Path]) -> dict[str, object]:
    """The answer of /api/models/{repo_id}/revision/{commit}, as far as clients read it."""
    siblings = [{"rfilename": name, "size": path.stat().st_size} for name, path in files.items()]
    return {"_id": commit[:24], "id": repo_id, "sha": commit, "tags": [], "siblings": siblings}


def tree(files: dict[str, Path]) -> list[dict[str, object]]:
    """The answer of /api/models/{repo_id}/tree/{commit}."""
    entries: list[dict[str, object]] = []
    for name, path in files.items():
        size = path.stat().st_size
        entry: dict[str, object] = {
            "type": "file",
            "path": name,
            "size": size,
            "oid": git_sha1(path),
        }
        if is_large(path):
            entry["lfs"] = {"oid": sha256(path), "size": size, "pointerSize": 134}
        entries.append(entry)
    return entries


def sha256(path: Path) -> str:
    """What the Hub names a large file by."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def git_sha1(path: Path) -> str:
    """What git names a small file by."""
    data = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
