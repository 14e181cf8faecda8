"""What a `HubServer` that is written to keeps: accounts by token, and uploads as files."""

import threading
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Account:
    """Who a token belongs to, and what it may do."""

    name: str
    role: str = "write"  # "read", "write" or "fineGrained"
    orgs: tuple[str, ...] = ()

    def owns(self, repo_id: str) -> bool:
        """Whether the repository is in a namespace of this account."""
        return repo_id.partition("/")[0] in (self.name, *self.orgs)

    def may_write(self, repo_id: str) -> bool:
        """Whether the token may write to the repository."""
        return self.role != "read" and self.owns(repo_id)

    def described(self) -> dict[str, Any]:
        """The answer of /api/whoami-v2."""
        token = {"displayName": "a token", "role": self.role}
        return {
            "type": "user",
            "name": self.name,
            "orgs": [{"type": "org", "name": name} for name in self.orgs],
            "auth": {"type": "access_token", "accessToken": token},
        }


class RefusedError(Exception):
    """Ends a request with a status, one of the Hub's error codes, a message, and more to say."""

    def __init__(self, status: int, code: str = "", message: str = "", **more: str) -> None:
        self.status, self.code, self.message, self.more = status, code, message, more


@dataclass
class Store:
    """Where uploads are kept: `folder/lfs/OID`, and one folder for each file of a commit."""

    folder: Path
    multipart_bytes: int = 0  # uploads larger than this come in parts of this size; 0: never
    lfs: dict[str, Path] = field(default_factory=dict)  # claimed sha256 -> what was stored
    num_files: int = 0
    lock: threading.RLock = field(default_factory=threading.RLock)

    def new_file(self, name: str) -> Path:
        """A path for a committed file; it keeps its name, since the suffix says what it is."""
        with self.lock:
            self.num_files += 1
            path = self.folder / "files" / str(self.num_files) / Path(name).name
        path.parent.mkdir(parents=True)
        return path

    def receive(self, oid: str, part: int, data: bytes) -> None:
        """Keep one part of an upload; part 0 is a whole one."""
        path = self.folder / "lfs" / (f"{oid}.{part}" if part else oid)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        if part == 0:
            self.lfs[oid] = path

    def complete(self, oid: str, parts: Iterable[int]) -> None:
        """Join the parts of an upload."""
        path = self.folder / "lfs" / oid
        pieces = [self.folder / "lfs" / f"{oid}.{number}" for number in parts]
        path.write_bytes(b"".join(piece.read_bytes() for piece in pieces))
        for piece in pieces:
            piece.unlink()
        self.lfs[oid] = path
