"""Names that the tests of the Hub share, and ways to ask what is there."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.checkpoints import Pair
from tests.hub_server.client import connected
from tests.hub_server.repo import Repo
from tests.hub_server.server import HubServer
from tests.hub_server.store import Account

REPO, MERGED, TOKEN = "org/prior", "org/merged", "hf_writer"


@dataclass(frozen=True)
class Artifacts:
    """What there is to send."""

    folder: Path
    pair: Pair

    @property
    def prior(self) -> Path:
        """A prior of several shards."""
        return self.folder / "prior"

    @property
    def other(self) -> Path:
        """A prior of the same pair with other bytes."""
        return self.folder / "other"

    @property
    def merged(self) -> Path:
        """A merge."""
        return self.folder / "merged"


@contextmanager
def account(folder: Path) -> Iterator[HubServer]:
    """A Hub with one account, whose token is set; everything is kept below `folder`."""
    with (
        pytest.MonkeyPatch.context() as patch,
        HubServer(folder / "store") as server,
        connected(server, folder / "home", patch),
    ):
        server.accounts[TOKEN] = Account("alice", orgs=("org",))
        patch.setenv("HF_TOKEN", TOKEN)
        yield server


def files_at(hub: HubServer, repo_id: str = REPO, ref: str = "main") -> dict[str, bytes]:
    """Every file of a branch."""
    repo: Repo = hub.repos[repo_id]
    commit = repo.refs[ref]
    return {name: path.read_bytes() for name, path in repo.commits[commit].items()}


def shards_of(directory: Path) -> list[str]:
    """The names of an artifact's shards."""
    return sorted(path.name for path in directory.glob("*.safetensors"))
