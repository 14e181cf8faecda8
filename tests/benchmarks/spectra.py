"""CPU-seconds of the spectral building blocks on matrices of the size of a 7B model, one core.

    OMP_NUM_THREADS=1 python tests/benchmarks/spectra.py [--full]

A delta is bfloat16 noise with a few directions of 20 % of the energy, as reasoner - base of a
model after reinforcement learning is said to have; "noise" has none, which is the worst case. The
last line is 28 layers of the seven projections of Qwen2.5-7B: the step on one of each shape is
measured, and multiplied.
"""

import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor

from drift_merge.maths.spectra.leading import full, leading
from drift_merge.maths.spectra.steps import SpectralStep

LAYERS = 28
PROJECTIONS = {(3584, 3584): 2, (512, 3584): 2, (18944, 3584): 2, (3584, 18944): 1}


def delta(rows: int, cols: int, *, is_noise: bool = False) -> Tensor:
    """A difference (rows, cols), float32."""
    generator = torch.Generator().manual_seed(rows + cols)
    found = torch.randn(rows, cols, generator=generator)
    norm = float(found.norm())
    for number in range(0 if is_noise else 4):
        u, v = (torch.randn(n, generator=generator) for n in (rows, cols))
        found.addr_(u / u.norm(), v / v.norm(), alpha=norm * (0.2 / (number + 1)) ** 0.5)
    return (found * 1e-4).bfloat16().float()


def seconds(work: Callable[..., object], *arguments: object) -> float:
    """CPU-seconds of a call."""
    before = time.process_time()
    work(*arguments)
    return time.process_time() - before


def step(matrix: Tensor) -> None:
    """What a merge does to one difference, beside what it does without a step."""
    SpectralStep(rank=1, norm="frobenius").apply(matrix, 1)


def main(*, measure_full: bool) -> None:
    """Print the table."""
    print(f"torch {torch.__version__}, {torch.get_num_threads()} thread; CPU-seconds")
    for rows, cols in ((18944, 3584), (3584, 3584)):
        for is_noise in (False, True):
            matrix = delta(rows, cols, is_noise=is_noise)
            for rank in (1, 16, 64):
                took = seconds(leading, matrix, rank, 1)
                kind = "noise" if is_noise else "delta"
                print(f"{rows} x {cols} {kind:5} leading {rank:2}: {took:6.2f}", flush=True)
            if measure_full and not is_noise:
                print(f"{rows} x {cols} full: {seconds(full, matrix):6.1f}", flush=True)
    total = 0.0
    for (rows, cols), count in PROJECTIONS.items():
        total += count * seconds(step, delta(rows, cols))
    print(f"rank 1 of a layer of a 7B: {total:.2f}; of 28 layers: {LAYERS * total:.0f}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(measure_full="--full" in sys.argv)
