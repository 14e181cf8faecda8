"""A Hub on loopback that holds a model of two shards."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from drift_merge.storage.hub import faults
from drift_merge.storage.weight_map import INDEX
from tests.hub_server.client import connected
from tests.hub_server.server import HubServer
from tests.storage.hub.models import REPO, SHARDS, write_shard


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    monkeypatch.setattr(faults, "WAITS_SECONDS", (0.01, 0.02))
    with HubServer() as server, connected(server, tmp_path / "home", monkeypatch):
        yield server


@pytest.fixture
def sharded(hub: HubServer, tmp_path: Path) -> Path:
    """A repository of two shards with the files that real ones have beside them."""
    folder = tmp_path / "model"
    weight_map = {}
    for number, shard in enumerate(SHARDS):
        names = [f"layers.{number}.{part}.weight" for part in ("q", "k", "v", "o")]
        write_shard(folder / shard, names)
        weight_map |= dict.fromkeys(names, shard)
    sidecars = ["tokenizer.json", "code/modeling_x.py", "code/__init__.py", "chat_template.jinja"]
    others = ["pytorch_model.bin", "consolidated.safetensors", "original/params.json", "m.gguf"]
    for name in [*sidecars, *others, "README.md", ".gitattributes"]:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(f"this is {name}")
    (folder / "config.json").write_text('{"model_type": "x"}')
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    hub.add_commit(REPO, folder)
    return folder
