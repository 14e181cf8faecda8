"""Where adding ranks stops helping: 1 to 64 of them, from costs measured here.

    python tests/benchmarks/make_checkpoints.py --size 1 --base --out models
    python tests/benchmarks/scale.py models
    python tests/benchmarks/scale.py --plan       # planning alone: CPU seconds and memory

Measured: CPU seconds a byte of the model, by method (one worker, start and plan excluded), and how
evenly the division that is used spreads a model. Given: the seconds of planning, which `--plan`
measures with `--dry-run` on files of holes: 1 T parameters in 100,000 tensors and 400 shards.
Simulated: a
model of `--terabytes` in `--tensors`, on ranks of `--cores` each, that share a file system:

    start + planning + max(bytes * cost / (ranks * cores) * imbalance, moved / bandwidth) + end

CPU seconds, so that other work on the machine does not count; no waiting for the disk is in them.
"""

import argparse
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from drift_merge.engine.ranks.division import part_of  # noqa: E402
from tests.benchmarks.make_checkpoints import write_sparse  # noqa: E402

METHODS = {"linear": ("--weight", "0.3"), "ties": ("--base", "base")}
RANKS = (1, 2, 4, 8, 16, 32, 64)
START_SECONDS = 5.0  # torch from a warm disk, and the meeting of the ranks
END_SECONDS = 2e-4  # a tensor: manifest, headers, the rename; by the first rank alone


def cpu_seconds(words: list[str], folder: Path) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    run = [sys.executable, "-m", "drift_merge", *words, "-q", "--threads", "1"]
    subprocess.run(
        run, cwd=folder, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def measure(name: str, folder: Path) -> tuple[float, int]:
    """CPU seconds a byte of the model, and how often each byte of it is moved."""
    options = METHODS[name]
    words = [name, "reasoner", "mllm", *options]
    with tempfile.TemporaryDirectory(dir=folder) as place:
        plan = cpu_seconds([*words, "-o", f"{place}/out", "--dry-run"], folder)
        work = cpu_seconds([*words, "-o", f"{place}/out"], folder)
    return (work - plan) / size_of(folder / "mllm"), 4 if "--base" in options else 3


def imbalance(num_tensors: int, ranks: int) -> float:
    """The largest part over the mean, of a model with matrices of unlike sizes."""
    sizes = [(5, 5, 1, 3, 3, 14, 14, 14)[i % 8] for i in range(num_tensors)]
    parts = [sum(sizes[part_of(sizes, rank, ranks)]) for rank in range(ranks)]
    return max(parts) * ranks / sum(sizes)


def measure_plan(times: int) -> None:
    """Print CPU seconds (user and system, start included) and peak memory of planning."""
    with tempfile.TemporaryDirectory() as place:
        for name in ("reasoner", "mllm"):
            write_sparse(Path(place, name), 8333, 400, intermediate=25300)
        words = ["linear", "reasoner", "mllm", "--weight", "0.3", "-o", "out", "--dry-run"]
        found = [cpu_seconds(words, Path(place)) for _ in range(times)]
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1000
    print(" ".join(f"{seconds:.1f}" for seconds in found), f"CPU seconds; {peak:.0f} MB")


def main() -> None:
    """Measure, simulate, print a table in Markdown."""
    parser = argparse.ArgumentParser()
    parser.add_argument("models", type=Path, nargs="?", default=Path("models"))
    parser.add_argument("--plan", action="store_true", help="measure planning, nothing else")
    parser.add_argument("--terabytes", type=float, default=2.0)
    parser.add_argument("--tensors", type=int, default=100_000)
    parser.add_argument("--cores", type=int, default=16)
    parser.add_argument("--plan-seconds", type=float, default=11.0, help="of 100,000 tensors")
    given = parser.parse_args()
    if given.plan:
        return measure_plan(times=3)
    size = given.terabytes * 1e12
    planning = given.plan_seconds * given.tensors / 100_000
    print("| method | bandwidth |", " | ".join(f"{ranks}" for ranks in RANKS), "|")
    print("|---|---|" + "---|" * len(RANKS))
    for name in METHODS:
        cost, moves = measure(name, given.models)
        for bandwidth in (2e9, 10e9, 40e9):
            cells = []
            for ranks in RANKS:
                uneven = imbalance(given.tensors, ranks)
                work = size * cost / (ranks * given.cores) * uneven
                moved = moves * size / bandwidth
                total = START_SECONDS + planning + max(work, moved) + END_SECONDS * given.tensors
                cells.append(f"{total / 60:.1f}{'*' if moved >= work else ''}")
            label = f"{name} ({cost * 1e9:.2f} ns a byte)"
            print(f"| {label} | {bandwidth / 1e9:.0f} GB/s |", " | ".join(cells), "|")


if __name__ == "__main__":
    main()
