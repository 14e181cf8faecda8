"""Time and memory of `compute` and `linear` against a plain copy, and against mergekit.

    python tests/benchmarks/make_checkpoints.py --size 3 --out /data/3    # also 1 and 6
    python tests/benchmarks/core.py /data/3 [/data/1 /data/6] [--runs 3] [--mergekit PROGRAM]

Every row is a whole process, the rows taken in turn so that drift of the machine hits all alike;
medians are printed. Start-up is the same command on a tiny pair. "beyond" is the rest of the
time, and "ratio" that rest over the copy: reading both inputs and copying one, with sync.
Memory is sampled from the kernel every 10 ms: anonymous (what the process owns) and resident.
"""

import argparse
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from drift_merge.cli.commands.demo import make_pair

MERGEKIT_YAML = """\
merge_method: linear
dtype: bfloat16
models:
  - model: {mllm}
    parameters: {{weight: 0.9}}
  - model: {reasoner}
    parameters: {{weight: 0.1}}
"""


@dataclass
class Sample:
    """One run of a process."""

    wall_seconds: float
    cpu_seconds: float
    anonymous_mb: float
    resident_mb: float


def memory(process: int) -> dict[str, int]:
    """RssAnon and VmRSS of a process and its children, kB; 0 where they have ended."""
    found = {"RssAnon": 0, "VmRSS": 0}
    try:
        children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
        for one in (process, *map(int, children)):
            for line in Path(f"/proc/{one}/status").read_text().splitlines():
                key, _, value = line.partition(":")
                if key in found:
                    found[key] += int(value.split()[0])
    except OSError:
        return dict.fromkeys(found, 0)
    return found


def measure(command: list[str]) -> Sample:
    """Run a command to its end, watching its memory; a failure is an error.

    Memory is that of the process and its children together: pages that a child shares with its
    parent count twice.
    """
    peak = {"RssAnon": 0, "VmRSS": 0}
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)

    def watch() -> None:
        while process.returncode is None:
            for key, size in memory(process.pid).items():
                peak[key] = max(peak[key], size)
            time.sleep(0.01)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    import os

    assert process.stderr is not None
    errors = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - started
    process.returncode = os.waitstatus_to_exitcode(status)
    process.stderr.close()
    watcher.join()
    if process.returncode != 0:
        raise SystemExit(f"{' '.join(command)} failed:\n{errors.decode()[-2000:]}")
    cpu = usage.ru_utime + usage.ru_stime
    return Sample(wall, cpu, peak["RssAnon"] / 1e3, peak["VmRSS"] / 1e3)


def commands(pair: Path, out: Path, mergekit: str | None) -> dict[str, list[str]]:
    """What is measured, by name; every command writes to `out`."""
    reasoner, mllm = (str((pair / name).resolve()) for name in ("reasoner", "mllm"))
    tool = [sys.executable, "-m", "drift_merge"]
    prior = [sys.executable, "-c", "from drift_merge.cli.prior import main; main()"]
    copy = f"cat {reasoner}/* {mllm}/* > /dev/null; mkdir -p {out}; cp {mllm}/* {out}; sync"
    rows = {
        "copy": ["sh", "-c", copy],
        "compute": [*prior, "compute", reasoner, mllm, "-o", str(out), "-q"],
        "linear": [*tool, "linear", reasoner, mllm, "-o", str(out), "-q"],
    }
    if mergekit:
        recipe = out.parent / f"{pair.name}.yaml"
        recipe.write_text(MERGEKIT_YAML.format(mllm=mllm, reasoner=reasoner))
        rows["mergekit"] = [mergekit, str(recipe), str(out)]
    return rows


def run_all(pair: Path, scratch: Path, runs: int, mergekit: str | None) -> dict[str, Sample]:
    """The medians of all rows on one pair, rows in turn."""
    samples: dict[str, list[Sample]] = {}
    for _ in range(runs):
        out = scratch / "out"
        for name, command in commands(pair, out, mergekit).items():
            shutil.rmtree(out, ignore_errors=True)
            subprocess.run(["sync"], check=True)
            samples.setdefault(name, []).append(measure(command))
            shutil.rmtree(out, ignore_errors=True)
    return {name: median(found) for name, found in samples.items()}


def median(samples: list[Sample]) -> Sample:
    """Field by field."""
    return Sample(
        statistics.median(s.wall_seconds for s in samples),
        statistics.median(s.cpu_seconds for s in samples),
        max(s.anonymous_mb for s in samples),
        max(s.resident_mb for s in samples),
    )


def main() -> None:
    """Print one table per pair."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pairs", nargs="+", type=Path, help="directories with reasoner/ and mllm/")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--mergekit", help="path of mergekit-yaml in its own environment")
    parser.add_argument("--scratch", type=Path, help="where outputs go; default beside the pair")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.scratch or args.pairs[0].parent) as folder:
        scratch = Path(folder)
        tiny = scratch / "tiny"
        make_pair(tiny)
        startup = run_all(tiny, scratch, args.runs, None)
        if args.mergekit:
            startup["mergekit"] = median(
                [measure([args.mergekit, "--help"]) for _ in range(args.runs)]
            )
        for pair in args.pairs:
            for path in pair.glob("*/*.safetensors"):
                subprocess.run(["cat", str(path)], stdout=subprocess.DEVNULL, check=True)
            rows = run_all(pair, scratch, args.runs, args.mergekit)
            copy = rows["copy"].wall_seconds
            print(f"\n{pair.name}: median of {args.runs}; start-up measured on a tiny pair")
            print("row       wall s  start-up s  beyond s  ratio  cpu s  anonymous MB  resident MB")
            for name, row in rows.items():
                start = 0.0 if name == "copy" else startup[name].wall_seconds
                beyond = row.wall_seconds - start
                print(
                    f"{name:8} {row.wall_seconds:7.2f} {start:11.2f} {beyond:9.2f} "
                    f"{beyond / copy:6.2f} {row.cpu_seconds:6.2f} {row.anonymous_mb:13.0f} "
                    f"{row.resident_mb:12.0f}"
                )


if __name__ == "__main__":
    main()
