"""A Hub on loopback with models of several shards."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from drift_merge.storage.hub import ranges
from drift_merge.storage.loans import leases
from tests import checkpoints as c
from tests.hub_server.client import impatient
from tests.hub_server.models import MLLM, TOKENIZERS, make_layered_pair, publish, write_layered
from tests.hub_server.server import HubServer


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with impatient(tmp_path / "home", monkeypatch) as server:
        yield server


@pytest.fixture
def pair(hub: HubServer, tmp_path: Path) -> c.Pair:
    """A reasoner of 3 shards, an mllm of 4, a base of 2, on the Hub."""
    pair = make_layered_pair(tmp_path / "models")
    base = c.random_tensors(c.text_shapes(4), 5)
    words = {"tokenizer.json": TOKENIZERS[MLLM]}
    folder = tmp_path / "models" / "base"
    write_layered(folder, base, c.text_config(4), num_shards=2, sidecars=words)
    publish(hub, pair, folder)
    return pair


@pytest.fixture
def in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Part even the small shards of tests where less than half of them is needed."""
    monkeypatch.setattr(leases, "WORTH_PARTING_BYTES", 0)
    monkeypatch.setattr(ranges, "GAP_BYTES", 0)


@pytest.fixture
def large(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> c.Pair:
    """10 MB on either side, in shards of about 1 MB."""
    for name, value in {"HIDDEN": 256, "KV": 128, "INTERMEDIATE": 512, "VISION": 64}.items():
        monkeypatch.setattr(c, name, value)
    pair = make_layered_pair(tmp_path / "models", layers=8, num_shards=(8, 10))
    publish(hub, pair)
    return pair
