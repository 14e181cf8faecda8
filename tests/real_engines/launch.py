"""Start the processes of a scenario, wait for them within a time, collect what they saved.

No network but 127.0.0.1, no fixed port (a file is the rendezvous), and no process outlives its
test.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[2]
TAIL = 4000  # characters of a log in a message


def launch(
    scenario: str, directory: Path, *, world: int = 2, seconds: float = 300, **settings: Any
) -> list[dict[str, Any]]:
    """Run `tests.real_engines.scenarios.SCENARIOS[scenario]` in `world` processes.

    Args:
        scenario: its name.
        directory: for logs, the rendezvous and the results; created.
        world: number of processes.
        seconds: after which all are killed and the test fails.
        settings: handed to the scenario; plain data.

    Returns:
        What each rank's scenario returned, in the order of the ranks.
    """
    directory.mkdir(parents=True)
    spec = {"scenario": scenario, "directory": str(directory), "settings": settings}
    processes = []
    for rank in range(world):
        with open(directory / f"{rank}.log", "w") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "tests.real_engines.worker", json.dumps(spec)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
                env=_environment(rank, world),
            )
        processes.append(process)
    try:
        _wait(processes, directory, time.monotonic() + seconds)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return [torch.load(directory / f"{rank}.pt", weights_only=False) for rank in range(world)]


def _environment(rank: int, world: int) -> dict[str, str]:
    return os.environ | {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "GLOO_SOCKET_IFNAME": "lo",
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": str(ROOT),
    }


def _wait(processes: list[subprocess.Popen[bytes]], directory: Path, deadline: float) -> None:
    """Until all have ended well; one that fails ends the wait, since the others would hang."""
    while any(process.poll() is None for process in processes):
        failed = any(process.poll() not in (None, 0) for process in processes)
        if failed or time.monotonic() > deadline:
            time.sleep(1)  # for the last words of the others
            break
        time.sleep(0.05)
    codes = [process.poll() for process in processes]
    if any(codes):
        raise AssertionError(f"exit codes {codes}\n{_logs(directory)}")
    if None in codes:
        raise AssertionError(f"not finished in time, exit codes {codes}\n{_logs(directory)}")


def _logs(directory: Path) -> str:
    return "\n".join(
        f"--- {path.name}\n{path.read_text(errors='replace')[-TAIL:]}"
        for path in sorted(directory.glob("*.log"))
    )
