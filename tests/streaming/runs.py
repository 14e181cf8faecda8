"""Commands on models of the Hub with `--stream`, and what they leave."""

import json
import os
import re
import threading
from pathlib import Path

from tests.faults.harness import Result, assert_refusal, run
from tests.hub_server.models import BASE, MLLM, REASONER

COMMANDS = {
    "compute": ["drift-prior", "compute", REASONER, MLLM],
    "compute on a base": ["drift-prior", "compute", REASONER, MLLM, "--base", BASE],
    "compute of some layers": ["drift-prior", "compute", REASONER, MLLM, "--layers", "1"],
    "compute with the embedding": ["drift-prior", "compute", REASONER, MLLM, "--modules", "full"],
    "linear": ["drift-merge", "linear", REASONER, MLLM],
    "linear, cast": ["drift-merge", "linear", REASONER, MLLM, "--dtype", "float32"],
    "a measured method": ["drift-merge", "slerp", REASONER, MLLM, "--t", "0.3"],
    "two reasoners, one of them the base": [
        *("drift-merge", "task-arithmetic", REASONER, BASE, MLLM, "--base", BASE),
    ],
    "one walk before": [
        *("drift-merge", "task-arithmetic", REASONER, MLLM, "--base", BASE, "--weight", "frank"),
    ],
    "two walks before": [
        *("drift-merge", "ties", REASONER, MLLM, "--base", BASE, "--density", "0.5"),
        *("--trim", "global"),
    ],
}


def stream(command: list[str], out: Path, *options: str) -> Result:
    return run(*command, "-o", str(out), "--threads", "2", "--stream", *options)


def succeed(command: list[str], out: Path, *options: str) -> dict[str, int]:
    """Stream, and return the traffic."""
    result = stream(command, out, "--json", *options)
    assert result.code == 0, result
    assert not out.with_name(f"{out.name}.partial").exists()
    return dict(json.loads(result.stdout).get("traffic", {}))


def least_limit(command: list[str], out: Path) -> int:
    """The least --cache-limit that a command accepts, as its refusal of a smaller one says."""
    result = stream(command, out, "--cache-limit", "1")
    assert_refusal(result, 2, ["--cache-limit is 1 bytes", "shards at the same time"])
    found = re.search(r"needs ([\d,]+) bytes", result.stderr)
    assert found
    assert not out.exists()
    return int(found[1].replace(",", ""))


class DiskWatch:
    """The most bytes that ever lay below a directory, looked at all the time."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.peak_bytes = 0
        self.num_looks = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look)

    def __enter__(self) -> "DiskWatch":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._ended.wait(0.002):
            size = 0
            for folder, _, names in os.walk(self.directory):
                for name in names:
                    try:
                        size += os.stat(os.path.join(folder, name)).st_blocks * 512
                    except FileNotFoundError:
                        continue
            self.peak_bytes = max(self.peak_bytes, size)
            self.num_looks += 1
