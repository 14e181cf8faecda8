"""The repositories of a `HubServer`: commits over local files, and what its API says of them."""

import hashlib
import re
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

LARGE_SUFFIXES = (".safetensors", ".bin", ".gguf")  # files that the Hub keeps in LFS


@dataclass
class Repo:
    """One repository: commits are maps from path to a local file, refs name commits."""

    repo_id: str
    commits: dict[str, dict[str, Path]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    private: bool = False  # everything needs a token
    gated: bool = False  # the listing is public, files need a token with access
    discussions: list[dict[str, Any]] = field(default_factory=list)  # as the API shows them
    log: list[tuple[str, str, list[str]]] = field(default_factory=list)  # pushed commits, in order

    def add_commit(self, folder: Path, ref: str) -> str:
        """Make the folder's files the newest commit of a branch (or tag); return its hash."""
        files = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file()}
        commit = self.next_hash()
        self.commits[commit] = dict(sorted(files.items()))
        self.refs[ref] = commit
        return commit

    def next_hash(self) -> str:
        """The hash of the next commit."""
        return hashlib.sha1(f"{self.repo_id} {len(self.commits)}".encode()).hexdigest()


def is_large(path: Path) -> bool:
    """Whether the Hub would keep the file in LFS and serve it from the CDN."""
    return path.name.endswith(LARGE_SUFFIXES)


def info(repo: Repo, commit: str, files: dict[str, Path]) -> dict[str, object]:
    """The answer of /api/models/{repo_id}/revision/{commit}, as far as clients read it."""
    siblings = [{"rfilename": name, "size": path.stat().st_size} for name, path in files.items()]
    card = card_data(files.get("README.md"))
    return {
        "_id": commit[:24],
        "id": repo.repo_id,
        "sha": commit,
        "private": repo.private,
        "gated": "manual" if repo.gated else False,
        "tags": [f"license:{card['license']}"] if "license" in card else [],
        "siblings": siblings,
        "cardData": card,
    }


def card_data(card: Path | None) -> dict[str, Any]:
    """The front matter of a card."""
    front = re.match(r"---\n(.*?)\n---\n", card.read_text(), re.DOTALL) if card else None
    return yaml.safe_load(front[1]) if front else {}


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
    stat = path.stat()
    return _sha256(path, stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=1000)
def _sha256(path: Path, *_: int) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def git_sha1(path: Path) -> str:
    """What git names a small file by."""
    data = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
