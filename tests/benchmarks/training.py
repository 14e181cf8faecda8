"""Cost of the injection against a plain training step, and against the reference's hooks.

    pip install transformers
    drift-prior compute REASONER MLLM -o PRIOR
    python tests/benchmarks/training.py MODEL PRIOR [--batch 4] [--tokens 32] [--rounds 7]

MODEL is a text model with the tower of the prior's mllm, e.g. SmolLM2-135M. It is trained in
float32 by AdamW. Every round takes the rows in turn, so that drift of the machine hits all alike;
medians are printed. "by the loop" is the same without compiled kernels, as where there is no
compiler. "inside" is the time spent in our code, or in the hooks, within the step.

The naive hook is the reference's formula as its code has it: on every parameter, in every
backward pass, the delta copied to the gradient's device and dtype, cosine and norms by whole
tensors. Memory is sampled from the kernel: what the process owns (RssAnon) before attach() and
at its peak in attach() and the first step, gradients and optimizer state allocated before.
"""

import argparse
import os
import statistics
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from torch import Tensor, nn

import drift_merge
from drift_merge.priors.deltas import open_deltas
from drift_merge.priors.manifest import Prior
from drift_merge.training.inject.kernels.choose import VARIABLE
from drift_merge.training.match.matching import match

MB = 1e6
clock = time.perf_counter


class Clock:
    """Adds up the seconds that a function takes."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any) -> Any:
            started = clock()
            result = function(*arguments)
            self.seconds += clock() - started
            return result

        return timed


class Naive:
    """adaptive_cosine by hooks, straight from the formula; delta is held on the CPU as stored."""

    def __init__(self, model: nn.Module, prior: Prior, clock: Clock) -> None:
        shapes = {name: tuple(entry["shape"]) for name, entry in prior.tensors.items()}
        self._handles = []
        with open_deltas(prior) as deltas:
            for unit in match(model, shapes).units:
                assert unit.parameter is not None
                delta = deltas.read(unit.name).clone().view(unit.shape)
                hook = clock.around(lambda g, d=delta: self._bias(g, d))
                self._handles.append(unit.parameter.register_hook(hook))

    @staticmethod
    def _bias(gradient: Tensor, stored: Tensor) -> Tensor:
        delta = stored.to(gradient.device).to(gradient.dtype)
        delta_norm, norm = delta.norm(), gradient.norm()
        direction = delta / (delta_norm + 1e-12)
        cosine = (gradient * direction).sum() / (norm + 1e-12)
        return gradient - 0.5 * (1.0 + cosine) * norm * direction

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()


class Training:
    """A model, its optimizer, and one step of any kind."""

    def __init__(self, model: nn.Module, batch: int, tokens: int) -> None:
        self.model = model
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-7)
        self.ids = torch.randint(0, 49_000, (batch, tokens))

    def step(self, accumulation: int, before: Callable[[], Any] = lambda: None) -> float:
        started = clock()
        for _ in range(accumulation):
            (self.model(input_ids=self.ids, labels=self.ids).loss / accumulation).backward()
        before()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return clock() - started


def anonymous_mb() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    found = next(line for line in lines if line.startswith("RssAnon"))
    return int(found.split()[1]) * 1024 / MB


def peak_mb(work: Callable[[], Any]) -> tuple[float, Any]:
    """By how much `work` raises what the process owns at most, and what it returns."""
    before, peak, done = anonymous_mb(), [0.0], threading.Event()

    def watch() -> None:
        while not done.wait(0.002):
            peak[0] = max(peak[0], anonymous_mb())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        result = work()
    finally:
        done.set()
        watcher.join()
    return peak[0] - before, result


def measure_memory(training: Training, prior: Prior) -> tuple[float, float, Any]:
    """Peaks in attach() and in the first apply(), and the handle."""
    training.step(1)  # the optimizer's state
    training.model(input_ids=training.ids, labels=training.ids).loss.backward()
    attached_mb, handle = peak_mb(lambda: drift_merge.attach(training.model, prior, strict=False))
    applied, _ = peak_mb(handle.apply)
    training.optimizer.step()
    training.optimizer.zero_grad()
    return attached_mb, applied, handle


KERNELS = {"drift_merge": "native", "drift_merge by the loop": "loop"}


@contextmanager
def attached(training: Training, prior: Prior, kernels: str) -> Iterator[Any]:
    """A handle that works with these kernels; a plain step beside a handle is refused."""
    os.environ[VARIABLE] = kernels
    handle = drift_merge.attach(training.model, prior, strict=False)
    for parameter in training.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    handle.apply()  # what is done once in a run: tables, and a compiler the first time
    training.optimizer.zero_grad()
    try:
        yield handle
    finally:
        handle.remove()
        del os.environ[VARIABLE]


Row = dict[str, list[float]]  # seconds of every round: "step" and "inside"


def measure_time(training: Training, prior: Prior, options: argparse.Namespace) -> dict[str, Row]:
    rows: dict[str, Row] = {}

    def add(name: str, seconds: float, inside: float) -> None:
        row = rows.setdefault(name, {"step": [], "inside": []})
        row["step"].append(seconds)
        row["inside"].append(inside)

    for _ in range(options.rounds):
        for accumulation in options.accumulation:
            add(f"plain, accumulation {accumulation}", training.step(accumulation), 0.0)
            for name, kernels in KERNELS.items():
                inside = Clock()
                with attached(training, prior, kernels) as handle:
                    seconds = training.step(accumulation, inside.around(handle.apply))
                add(f"{name}, accumulation {accumulation}", seconds, inside.seconds)
            inside = Clock()
            naive = Naive(training.model, prior, inside)
            seconds = training.step(accumulation)
            naive.remove()
            add(f"naive hook, accumulation {accumulation}", seconds, inside.seconds)
    return rows


def print_table(rows: dict[str, Row]) -> None:
    print("| row | step s | inside ms | inside / plain | step / plain |\n|---|--:|--:|--:|--:|")
    for name, row in rows.items():
        plain = rows[f"plain, accumulation {name.rsplit(' ', 1)[1]}"]["step"]
        step, inside = (statistics.median(row[key]) for key in ("step", "inside"))
        share = statistics.median(i / p for i, p in zip(row["inside"], plain, strict=True))
        ratio = statistics.median(s / p for s, p in zip(row["step"], plain, strict=True))
        print(f"| {name} | {step:.2f} | {1e3 * inside:.0f} | {share:.2%} | {ratio:.3f} |")
    last = max(int(name.rsplit(" ", 1)[1]) for name in rows)
    ours, theirs = (
        statistics.median(rows[f"{who}, accumulation {last}"]["inside"])
        for who in ("drift_merge", "naive hook")
    )
    print(f"\nAt accumulation {last} the naive hook takes {theirs / ours:.1f} times as long.")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("prior", type=Path)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--accumulation", type=int, nargs="+", default=[1, 8])
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="seconds of the processor, not of the wall: for a machine that others use; one thread",
    )
    options = parser.parse_args()
    if options.cpu_time:
        global clock
        clock = time.process_time
        torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # any model of the tower's shape will do
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).train()
    prior = drift_merge.load_prior(options.prior)
    training = Training(model, options.batch, options.tokens)
    attached_mb, applied, handle = measure_memory(training, prior)
    elements = handle.coverage.elements
    handle.remove()
    largest = 4 * max(p.numel() for p in model.parameters()) / MB
    print(
        f"{elements:,} elements biased, {torch.get_num_threads()} threads,"
        f" {options.batch} x {options.tokens} tokens\n"
    )
    print_table(measure_time(training, prior, options))
    print(
        f"\nExtra anonymous memory: {attached_mb:.0f} MB in attach(), {applied:.0f} MB in apply();"
        f" twice the largest tensor and 100 MB are {2 * largest + 100:.0f} MB."
    )


if __name__ == "__main__":
    main()
