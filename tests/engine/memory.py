"""Scripts that measure their own memory, and checkpoints that take no space."""

import json
import os
import struct
import subprocess
import sys
from math import prod
from pathlib import Path

from tests import checkpoints as c

ROOT = Path(__file__).parents[2]

# VmHWM and RssAnon belong to the process alone; ru_maxrss would count its parent's pages too.
STATUS = """
import re
def status(key):
    with open("/proc/self/status") as file:
        return int(re.search(rf"^{key}:\\s+(\\d+) kB", file.read(), re.M)[1]) * 1024
"""


def run(script, *arguments):
    done = subprocess.run(
        [sys.executable, "-c", STATUS + script, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def write_sparse(directory, shapes, config, num_shards):
    """A checkpoint of the right sizes that takes almost no space; all values are zero."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config))
    names, weight_map = list(shapes), {}
    for number in range(num_shards):
        shard = f"model-{number + 1:05d}-of-{num_shards:05d}.safetensors"
        header, at = {}, 0
        for name in names[number::num_shards]:
            size = 2 * prod(shapes[name])
            offsets = [at, at + size]
            header[name] = {"dtype": "BF16", "shape": shapes[name], "data_offsets": offsets}
            at += size
            weight_map[name] = shard
        text = json.dumps(header).encode()
        with open(directory / shard, "wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            file.truncate(8 + len(text) + at)
    c.write_index(directory, weight_map)
