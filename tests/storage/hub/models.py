"""The model that the tests of this folder read."""

import os
from pathlib import Path

from drift_merge.storage.headers import encode_header
from tests.hub_server.server import HubServer

SHARD_BYTES = 2_000_000


REPO = "org/name"


SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]


def write_shard(path: Path, names: list[str], size: int = SHARD_BYTES) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    header, _ = encode_header([(name, "U8", (size // len(names),)) for name in names], {})
    path.write_bytes(header + os.urandom(size // len(names) * len(names)))


def single(hub: HubServer, folder: Path, names: list[str], repo_id: str = REPO) -> Path:
    write_shard(folder / "model.safetensors", names)
    (folder / "config.json").write_text("{}")
    hub.add_commit(repo_id, folder)
    return folder / "model.safetensors"
