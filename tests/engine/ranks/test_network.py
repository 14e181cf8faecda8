"""Two hosts on one directory: two network namespaces joined by a cable, a torchrun in each."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.checkpoints import make_pair, read_files
from tests.faults.harness import run

ROOT = Path(__file__).parents[3]
ADDRESSES = ("10.213.77.1", "10.213.77.2")
INTERFACE = "cable"
SECONDS = 240


class Host(NamedTuple):
    """A network namespace, held by a process that sleeps."""

    holder: int  # its process id
    address: str

    def inside(self, *words: str) -> list[str]:
        return ["nsenter", "--net", "--target", str(self.holder), *words]


def allowed(*words: str) -> None:
    """Run what needs rights over the network; skip the test where this process has none."""
    try:
        subprocess.run(words, check=True, capture_output=True, text=True, timeout=20)
    except FileNotFoundError as error:
        pytest.skip(f"{words[0]} is not installed: {error}")
    except subprocess.CalledProcessError as error:
        pytest.skip(f"network namespaces are not allowed here: {error.stderr.strip()}")


@pytest.fixture
def hosts() -> Iterator[list[Host]]:
    """They and what joins them vanish with the processes that hold them."""
    allowed("unshare", "--net", "true")
    with ExitStack() as stack:
        found = []
        for address in ADDRESSES:
            holder = subprocess.Popen(["unshare", "--net", "sleep", str(2 * SECONDS)])
            stack.callback(holder.wait)
            stack.callback(holder.kill)
            found.append(Host(holder.pid, address))
        own = os.readlink("/proc/self/ns/net")
        deadline = time.monotonic() + 20
        while any(os.readlink(f"/proc/{host.holder}/ns/net") == own for host in found):
            assert time.monotonic() < deadline, "unshare does not come"
            time.sleep(0.05)
        ends = [["name", INTERFACE, "netns", str(host.holder)] for host in found]
        allowed("ip", "link", "add", *ends[0], "type", "veth", "peer", *ends[1])
        for host in found:
            allowed(*host.inside("ip", "addr", "add", f"{host.address}/24", "dev", INTERFACE))
            for name in ("lo", INTERFACE):
                allowed(*host.inside("ip", "link", "set", name, "up"))
        yield found


@pytest.mark.slow
def test_two_hosts_share_one_directory(hosts: list[Host], tmp_path: Path) -> None:
    pair = make_pair(tmp_path / "pair", layers=2, num_shards=(1, 2))
    words = ["linear", *pair.arguments, "--threads", "1", "--max-shard-size", "3KB"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2"]
    launcher += ["--nproc-per-node", "2", "--master-addr", ADDRESSES[0], "--master-port", "29500"]
    environment = os.environ | {"GLOO_SOCKET_IFNAME": INTERFACE, "OMP_NUM_THREADS": "1"}
    with ExitStack() as stack:
        running = []
        for number, host in enumerate(hosts):
            command = [*launcher, "--node-rank", str(number), "-m", "drift_merge"]
            process = subprocess.Popen(
                host.inside(*command, *words, "-o", str(tmp_path / "out")),
                cwd=ROOT,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            stack.callback(process.wait)
            stack.callback(process.kill)
            running.append(process)
        told = [process.communicate(timeout=SECONDS) for process in running]
    assert [process.returncode for process in running] == [0, 0], told
    assert str(tmp_path / "out") in told[0][0]
    assert told[1][0] == ""
    assert run("drift-merge", *words, "-o", str(tmp_path / "alone")).code == 0
    assert read_files(tmp_path / "out") == read_files(tmp_path / "alone")
    assert {path.name for path in tmp_path.iterdir()} == {"pair", "out", "alone"}
