"""Cost of the injection against a plain training step, and against the reference's hooks.

    pip install transformers
    drift-prior compute REASONER MLLM -o PRIOR
    python tests/benchmarks/training.py MODEL PRIOR [--batch 4] [--tokens 32] [--rounds 7]

MODEL is a text model with the tower of the prior's mllm, e.g. SmolLM2-135M. It is trained in
float32 by AdamW. Every round takes the rows in turn, so that drift of the machine hits all alike;
medians are printed. "inside" is the time spent in our code, or in the hooks, within the step.

The naive hook is the reference's formula as its code has it: on every parameter, in every
backward pass, the delta copied to the gradient's device and dtype, cosine and norms by whole
tensors. Memory is sampled from the kernel: what the process owns (RssAnon) before attach() and
at its peak in attach() and the first step, gradients and optimizer state allocated before.
"""

import argparse
import statistics
import sys
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from torch import Tensor, nn

import drift_merge
from drift_merge.priors.deltas import open_deltas
from drift_merge.priors.manifest import Prior
from drift_merge.training.match.matching import match

MB = 1e6


class Clock:
    """Adds up the seconds that a function takes."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any) -> Any:
            started = time.perf_counter()
            result = function(*arguments)
            self.seconds += time.perf_counter() - started
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
        started = time.perf_counter()
        for _ in range(accumulation):
            (self.model(input_ids=self.ids, labels=self.ids).loss / accumulation).backward()
        before()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return time.perf_counter() - started


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
    attached, handle = peak_mb(lambda: drift_merge.attach(training.model, prior, strict=False))
    applied, _ = peak_mb(handle.apply)
    training.optimizer.zero_grad()
    return attached, applied, handle


Row = dict[str, list[float]]  # seconds of every round: "step" and "inside"


def measure_time(training: Training, prior: Prior, handle: Any, rounds: int) -> dict[str, Row]:
    rows: dict[str, Row] = {}

    def add(name: str, seconds: float, inside: float) -> None:
        row = rows.setdefault(name, {"step": [], "inside": []})
        row["step"].append(seconds)
        row["inside"].append(inside)

    for _ in range(rounds):
        for accumulation in (1, 8):
            add(f"plain, accumulation {accumulation}", training.step(accumulation), 0.0)
            clock = Clock()
            seconds = training.step(accumulation, clock.around(handle.apply))
            add(f"drift_merge, accumulation {accumulation}", seconds, clock.seconds)
            clock = Clock()
            naive = Naive(training.model, prior, clock)
            seconds = training.step(accumulation)
            naive.remove()
            add(f"naive hook, accumulation {accumulation}", seconds, clock.seconds)
    return rows


def print_table(rows: dict[str, Row]) -> None:
    print("| row | step s | inside ms | inside / plain | step / plain |\n|---|--:|--:|--:|--:|")
    for name, row in rows.items():
        plain = rows[f"plain, accumulation {name.rsplit(' ', 1)[1]}"]["step"]
        step, inside = (statistics.median(row[key]) for key in ("step", "inside"))
        share = statistics.median(i / p for i, p in zip(row["inside"], plain, strict=True))
        ratio = statistics.median(s / p for s, p in zip(row["step"], plain, strict=True))
        print(f"| {name} | {step:.2f} | {1e3 * inside:.0f} | {share:.2%} | {ratio:.3f} |")
    ours, theirs = (
        statistics.median(rows[f"{who}, accumulation 8"]["inside"])
        for who in ("drift_merge", "naive hook")
    )
    print(f"\nAt accumulation 8 the naive hook takes {theirs / ours:.1f} times as long.")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("prior", type=Path)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    warnings.simplefilter("ignore")  # any model of the tower's shape will do
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).train()
    prior = drift_merge.load_prior(options.prior)
    training = Training(model, options.batch, options.tokens)
    attached, applied, handle = measure_memory(training, prior)
    elements = handle.coverage.elements
    largest = 4 * max(p.numel() for p in model.parameters()) / MB
    print(
        f"{elements:,} elements biased, {torch.get_num_threads()} threads,"
        f" {options.batch} x {options.tokens} tokens\n"
    )
    print_table(measure_time(training, prior, handle, options.rounds))
    print(
        f"\nExtra anonymous memory: {attached:.0f} MB in attach(), {applied:.0f} MB in apply();"
        f" twice the largest tensor and 100 MB are {2 * largest + 100:.0f} MB."
    )


if __name__ == "__main__":
    main()
