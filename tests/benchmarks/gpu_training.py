"""Cost of the injection on a GPU, and of --device cuda; one command, which needs a card.

    python tests/benchmarks/gpu_training.py --scratch DIR [--size 3] [--rounds 7]

makes a random pair of Qwen2.5-1.5B's shapes below DIR (3.09 GB each; --size 6 twice that), then

    compute, linear   whole processes on the CPU and with --device cuda, taken in turn; are the
                      outputs equal byte for byte?
    apply             one injection into bfloat16 gradients on the card, between two events of the
                      device, priors in bfloat16 and int8: resident with Triton's kernels, resident
                      by the loop, streamed; with the launches that the profiler saw

Medians are printed. Without a card it says so and ends with exit code 2. What it prints belongs
into `drift-prior guide training`, "On a GPU: an estimate".
"""

import argparse
import filecmp
import os
import shutil
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from safetensors import safe_open
from torch import nn

import drift_merge
from drift_merge.training.inject.kernels.choose import VARIABLE
from tests.benchmarks.make_checkpoints import LAYERS, make
from tests.training.toys import holder

PRIOR = [sys.executable, "-c", "from drift_merge.cli.prior import main; main()"]
MERGE = [sys.executable, "-m", "drift_merge"]
ROWS = {  # where delta waits, and who works
    "resident, kernels": ("cuda", "auto"),
    "resident, loop": ("cuda", "loop"),
    "streamed": ("cpu", "auto"),
}


def require_card() -> None:
    if not torch.cuda.is_available():
        print(
            "No CUDA device is visible to torch: this measures a GPU.\n"
            "On a machine with one: pip install torch, then run the same command again.",
            file=sys.stderr,
        )
        raise SystemExit(2)


def seconds_of(command: list[str], out: Path) -> float:
    shutil.rmtree(out, ignore_errors=True)
    started = time.perf_counter()
    subprocess.run([*command, "-o", str(out), "-q"], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


def measure_commands(pair: Path, scratch: Path, rounds: int) -> None:
    """Whole processes, the rows in turn."""
    sources = [str(pair / "reasoner"), str(pair / "mllm")]
    commands = {
        "compute": [*PRIOR, "compute", *sources],
        "linear": [*MERGE, "linear", *sources],
        "ties": [*MERGE, "ties", *sources, "--base", str(pair / "base")],
    }
    print("| command | CPU s | --device cuda s | equal bytes |\n|---|--:|--:|---|")
    for name, command in commands.items():
        found: dict[str, list[float]] = {"cpu": [], "cuda": []}
        for _ in range(rounds):
            for device, times in found.items():
                out = scratch / f"{name}-{device}"
                times.append(seconds_of([*command, "--device", device], out))
        shards = [path.name for path in (scratch / f"{name}-cpu").glob("*.safetensors")]
        folders = [scratch / f"{name}-{device}" for device in found]
        _, differ, failed = filecmp.cmpfiles(*folders, shards, shallow=False)
        times = (statistics.median(found[device]) for device in found)
        print(f"| {name} | {' | '.join(f'{t:.2f}' for t in times)} | {not differ + failed} |")


def model_of(checkpoint: Path) -> nn.Module:
    """The weights on the card, under their names, in bfloat16, with gradients."""
    with safe_open(checkpoint / "model.safetensors", "pt", device="cuda") as file:
        tensors = {name: nn.Parameter(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118
    for parameter in tensors.values():
        parameter.grad = torch.randn_like(parameter)
    return holder(tensors)


def milliseconds(work: Callable[[], Any]) -> tuple[float, float]:
    """Of the device, and of the host until all orders are given."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    started = time.perf_counter()
    begin.record()
    work()
    end.record()
    host = 1e3 * (time.perf_counter() - started)
    end.synchronize()
    return begin.elapsed_time(end), host


def launches_of(work: Callable[[], Any]) -> int:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        work()
        torch.cuda.synchronize()
    return sum(event.count for event in profile.key_averages())


def measure_apply(model: nn.Module, prior: Path, rounds: int) -> None:
    for name, (device, kernels) in ROWS.items():
        os.environ[VARIABLE] = kernels
        handle = drift_merge.attach(model, prior, device=device, strict=False)

        def apply(handle: Any = handle) -> None:
            handle.apply()

        def touch() -> None:  # as backward does: the same gradients cannot be biased twice
            for parameter in model.parameters():
                assert parameter.grad is not None
                parameter.grad.mul_(1.0)

        apply()  # placed, compiled
        found = []
        for _ in range(rounds):
            touch()
            found.append(milliseconds(apply))
        touch()
        launches = launches_of(apply)
        gpu, host = (statistics.median(column) for column in zip(*found, strict=True))
        elements = handle.coverage.elements
        print(
            f"| {prior.name}, {name} | {elements / 1e9:.2f} | {gpu:.2f} | {host:.2f} |"
            f" {1e6 * gpu / elements:.4f} | {launches:,} |"
        )
        print(f"  {handle.report()['placement']}", file=sys.stderr)
        handle.remove()
        del os.environ[VARIABLE]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--scratch", type=Path, required=True)
    parser.add_argument("--size", type=int, choices=sorted(LAYERS), default=3, help="GB, about")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    require_card()
    warnings.simplefilter("ignore")
    pair = options.scratch / f"pair-{options.size}"
    if not pair.exists():
        make(pair, options.size, base=True)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}\n")
    measure_commands(pair, options.scratch, min(options.rounds, 3))
    print("\n| apply | 1e9 elements | device ms | host ms | ns an element | launches |")
    print("|---|--:|--:|--:|--:|--:|")
    model = model_of(pair / "mllm")
    sources = [str(pair / "reasoner"), str(pair / "mllm")]
    for dtype in ("bfloat16", "int8"):
        prior = options.scratch / dtype
        seconds_of([*PRIOR, "compute", *sources, "--dtype", dtype], prior)
        measure_apply(model, prior, options.rounds)


if __name__ == "__main__":
    main()
