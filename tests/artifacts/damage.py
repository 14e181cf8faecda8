"""Ways to change a finished output, for tests of `verify`."""

import json
from pathlib import Path

from tests import checkpoints as c


def flip(path: Path, at: int) -> None:
    """Flip the lowest bit of one byte; negative counts from the end."""
    raw = bytearray(path.read_bytes())
    raw[at] ^= 1
    path.write_bytes(bytes(raw))


def data_start(path: Path) -> int:
    """Where the data of a shard begins."""
    return 8 + int.from_bytes(path.read_bytes()[:8], "little")


def edit_json(path: Path, change) -> None:
    """Apply a function to the value of a JSON file."""
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value, indent=1) + "\n")


def rewrite(path: Path, change) -> None:
    """Apply a function to the dict of tensors of a shard."""
    tensors = c.read_shard(path)
    change(tensors)
    c.write_shard(path, tensors)
