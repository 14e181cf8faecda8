"""Time of `--stream` against the slower of its two halves: the download alone, the work alone.

    python tests/benchmarks/streaming.py --scratch DIR [--layers 12] [--shards 6] [--runs 3]
        [--rates 100,200,400] [--cache-limit 1GB] [--commands compute,linear,ties]

makes a random pair of Qwen2.5-1.5B's shapes (94 MB a layer) with its ancestor below DIR, cut into
shards, and serves it from a Hub on loopback whose line is throttled to a number of MB/s, all
requests together. Rows are whole processes taken in turn; medians are printed:

    download   huggingface_hub's snapshot_download of all shards, by 8 threads, nothing else
    work       the command on local directories
    in turn    the command on Hub ids without --stream: download, then work
    --stream   the same with --stream; the cache of huggingface_hub is empty
    ratio      --stream over the slower of download and work

The server is a Python program on the same machine: on few cores it competes with the work.
"""

import argparse
import json
import os
import resource
import shutil
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.benchmarks.make_checkpoints import make
from tests.hub_server.client import environment
from tests.hub_server.models import BASE, MLLM, REASONER
from tests.hub_server.server import HubServer

SNAPSHOT = (
    "import sys; from huggingface_hub import snapshot_download as s; [s(r) for r in sys.argv[1:]]"
)
PRIOR = [sys.executable, "-c", "from drift_merge.cli.prior import main; main()"]
MERGE = [sys.executable, "-m", "drift_merge"]
COMMANDS = {
    "compute": ([*PRIOR, "compute"], False),
    "linear": ([*MERGE, "linear"], False),
    "ties": ([*MERGE, "ties", "--density", "0.2"], True),
}


@dataclass
class Measured:
    """One process."""

    seconds: float
    cpu_seconds: float
    peak_bytes: int  # of the directory that was watched


def shard(directory: Path, count: int) -> None:
    """Cut the one file of a checkpoint into shards of about equal size, in its order."""
    single = directory / "model.safetensors"
    with open(single, "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = {k: v for k, v in json.loads(file.read(length)).items() if k != "__metadata__"}
        total, groups, filled = (
            sum(e["data_offsets"][1] - e["data_offsets"][0] for e in header.values()),
            [[]],
            0,
        )
        for name, entry in header.items():
            if filled * count >= total * len(groups):
                groups.append([])
            groups[-1].append(name)
            filled += entry["data_offsets"][1] - entry["data_offsets"][0]
        weight_map = {}
        for number, names in enumerate(groups, start=1):
            shard_name = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
            weight_map |= dict.fromkeys(names, shard_name)
            _copy(file, 8 + length, {name: header[name] for name in names}, directory / shard_name)
    single.unlink()
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def _copy(file, begin: int, entries: dict, path: Path) -> None:
    at, header = 0, {"__metadata__": {"format": "pt"}}
    for name, entry in entries.items():
        size = entry["data_offsets"][1] - entry["data_offsets"][0]
        header[name] = {**entry, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as out:
        out.write(struct.pack("<Q", len(text)) + text)
        for entry in entries.values():
            first, last = entry["data_offsets"]
            file.seek(begin + first)
            while first < last:
                out.write(file.read(min(2**24, last - first)))
                first = min(first + 2**24, last)


def measure(command: list[str], env: dict[str, str], watched: Path) -> Measured:
    """Run a command to its end, looking at the size of a directory; a failure is an error."""
    peak, ended = 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not ended.wait(0.02):
            size = 0
            for folder, _, names in os.walk(watched):
                for name in names:
                    with suppress(OSError):
                        size += os.stat(os.path.join(folder, name)).st_blocks * 512
            peak = max(peak, size)

    watcher = threading.Thread(target=watch)
    watcher.start()
    started = time.perf_counter()
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - started
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    ended.set()
    watcher.join()
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Measured(seconds, cpu, peak)


def bench(args: argparse.Namespace, scratch: Path) -> None:
    """Print one table."""
    models = scratch / "models"
    for directory in make(models, 1, vision=True, base=True, layers=args.layers, vocab=2000):
        shard(directory, args.shards)
    sizes = {d.name: sum(p.stat().st_size for p in d.glob("*.s*")) for d in models.iterdir()}
    shards = max(p.stat().st_size for p in models.glob("*/*.s*"))
    print("Models:", ", ".join(f"{name} {size / 1e9:.2f} GB" for name, size in sizes.items()))
    print(f"{args.shards} shards each, the largest {shards / 1e6:.0f} MB;", end=" ")
    print(f"--cache-limit {args.cache_limit}; median of {args.runs}")
    print(f"{os.cpu_count()} cores, load average {os.getloadavg()[0]:.1f} at the start\n")
    print("seconds (of which CPU)")
    print("command   MB/s     download         work      in turn     --stream  ratio  shards MB")
    with HubServer() as hub:
        for repo_id, name in ((REASONER, "reasoner"), (MLLM, "mllm"), (BASE, "base")):
            hub.add_commit(repo_id, models / name)
        for name in args.commands.split(","):
            for rate in args.rates.split(","):
                hub.bytes_per_second = float(rate) * 1e6
                _row(name, rate, args, scratch, hub)


def _row(name: str, rate: str, args: argparse.Namespace, scratch: Path, hub: HubServer) -> None:
    command, has_base = COMMANDS[name]
    out, home = scratch / "out", scratch / "home"
    env = os.environ | environment(hub, home) | {"PYTHONPATH": str(Path(__file__).parents[2])}

    def sources(ids: bool) -> list[str]:
        found = [r if ids else str(scratch / "models" / r[4:]) for r in (REASONER, MLLM, BASE)]
        return [*found[:2], *(["--base", found[2]] if has_base else [])]

    ids = [REASONER, MLLM, *([BASE] if has_base else [])]
    rows = {
        "download": [sys.executable, "-c", SNAPSHOT, *ids],
        "work": [*command, *sources(False), "-o", str(out), "-q"],
        "in turn": [*command, *sources(True), "-o", str(out), "-q"],
        "--stream": [*command, *sources(True), "-o", str(out), "-q", "--stream"],
    }
    rows["--stream"] += ["--cache-limit", args.cache_limit]
    found: dict[str, list[Measured]] = {row: [] for row in rows}
    for _ in range(args.runs):
        for row, arguments in rows.items():
            for folder in (out, home):
                shutil.rmtree(folder, ignore_errors=True)
            subprocess.run(["sync"], check=True)
            found[row].append(measure(arguments, env, scratch / "out.partial" / "shards"))
    wall = {row: statistics.median(m.seconds for m in taken) for row, taken in found.items()}
    cpu = {row: statistics.median(m.cpu_seconds for m in taken) for row, taken in found.items()}
    ratio = wall["--stream"] / max(wall["download"], wall["work"])
    peak = max(m.peak_bytes for m in found["--stream"]) / 1e6
    cells = " ".join(f"{wall[row]:6.1f} ({cpu[row]:4.1f})" for row in rows)
    print(f"{name:8} {rate:>5} {cells} {ratio:6.2f} {peak:10.0f}", flush=True)


def main() -> None:
    """Parse and measure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scratch", type=Path, required=True, help="a disk with some GB free")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--shards", type=int, default=6)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--rates", default="100,200,400", help="MB/s of the line")
    parser.add_argument("--cache-limit", default="1GB")
    parser.add_argument("--commands", default="compute,linear,ties")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.scratch) as folder:
        bench(args, Path(folder))


if __name__ == "__main__":
    main()
