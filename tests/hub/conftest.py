"""A Hub that can be written to, an account, and artifacts to send.

The server speaks LFS, as the Hub does to a client without Xet: `tests/hub_server/client.py` sets
HF_HUB_DISABLE_XET, which is the only thing that the client is told beside the address.
"""

import shutil
import types
from collections.abc import Iterator
from pathlib import Path

import pytest

from drift_merge.hub import refusals
from drift_merge.storage.hub import faults
from tests import checkpoints as c
from tests.hub.places import REPO, Artifacts, account
from tests.hub_server.repo import Repo
from tests.hub_server.server import HubServer
from tests.runs import run_linear, run_prior

# huggingface_hub 2.4 itself calls its transport in a way that the transport has deprecated.
_NOT_OURS = "ignore:Use 'content=<...>' to upload raw bytes:DeprecationWarning"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let the client warn of itself in the tests of this folder."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.filterwarnings(_NOT_OURS))


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that everybody has waited, without waiting."""
    waited: list[float] = []
    clock = types.SimpleNamespace(sleep=waited.append)
    for module in ("huggingface_hub.utils._http", "drift_merge.hub.refusals"):
        monkeypatch.setattr(f"{module}.time", clock)
    monkeypatch.setattr(faults, "WAITS_SECONDS", (0.01, 0.02))
    monkeypatch.setattr(refusals, "WAITS_SECONDS", (0.01, 0.02))
    return waited


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, waits: list[float]) -> Iterator[HubServer]:
    """A Hub with one account, whose token is set."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    with account(tmp_path) as server:
        yield server


@pytest.fixture
def repo(hub: HubServer) -> Repo:
    """The repository that is pushed to; empty, private, and there."""
    from huggingface_hub import HfApi

    HfApi().create_repo(REPO, private=True)
    hub.forget_requests()
    return hub.repos[REPO]


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Artifacts:
    """A pair, a prior of several shards, another prior, and a merge; read, never written."""
    folder = tmp_path_factory.mktemp("built")
    pair = c.make_pair(folder, layers=2, mllm_sidecars=c.SIDECARS)
    run_prior(*pair, folder / "prior", max_shard_size="1KB")
    run_prior(*pair, folder / "other", max_shard_size="1KB", dtype="float32")
    run_linear(*pair, folder / "merged", 0.1, max_shard_size="1KB")
    return Artifacts(folder, pair)


@pytest.fixture
def own(built: Artifacts, tmp_path: Path) -> Artifacts:
    """The same artifacts, to be changed."""
    folder = tmp_path / "own"
    folder.mkdir()
    for name in ("prior", "merged"):
        shutil.copytree(built.folder / name, folder / name)
    return Artifacts(folder, built.pair)
