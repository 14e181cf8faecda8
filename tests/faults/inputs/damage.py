"""Ways to damage a checkpoint, shared by the tests of inputs."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.checkpoints import Pair

COMMANDS = ("align", "compute", "linear")
ROLES = ("reasoner", "mllm")
SHARD = "model-00001-of-00002.safetensors"
OTHER = "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"
Q = "model.layers.0.self_attn.q_proj.weight"
K = "model.layers.0.self_attn.k_proj.weight"

Break = Callable[[Path], None]  # damages the checkpoint in a directory


def header_of(path: Path) -> tuple[dict[str, Any], bytes]:
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def tensor_of(header: dict[str, Any]) -> str:
    return next(name for name in header if name != "__metadata__")


def damaged(whole: Pair, role: str, directory: Path, damage: Break) -> Pair:
    """A pair whose damaged side is a copy, and the other the whole one."""
    source = getattr(whole, role)
    target = directory / role
    target.mkdir()
    for path in source.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    damage(target)
    return whole._replace(**{role: target})
