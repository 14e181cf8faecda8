"""Nanoseconds per entry of every merge method, on tensors in memory, one thread.

    python tests/benchmarks/methods.py [--elements N] [--runs N] [METHOD ...]

The tensors are bfloat16 and read as the stream reads them: chunks of 2**17 entries, copied to
float32 in preallocated buffers. "read" is that alone. The least of several runs is printed, per
entry of the output; "a model" divides by the number of inputs (mllm, reasoner and base). "normal"
inputs are normal deltas; "tied" ones are what fine-tuning in bfloat16 leaves: few values, many
equal.
"""

import argparse
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))

from drift_merge.maths.chunks import BLOCK, Chunk, Read
from drift_merge.maths.methods import METHODS
from tests.maths.methods.driver import settings_for

ROW = 2**11
RUN = 2**12  # entries in a row of a sample


def reader(inputs: list[Tensor], *, has_base: bool) -> Read:
    """Reads as the engine does, into the same buffers again and again."""
    buffers = [torch.empty(BLOCK) for _ in inputs]

    def read(*, sample: bool = False) -> Iterator[Chunk]:
        numel = inputs[0].numel()
        size, step = (RUN, 64 * RUN) if sample else (BLOCK, BLOCK)
        for begin in range(0, numel, step):
            end = min(begin + size, numel)
            parts = [
                b[: end - begin].copy_(t[begin:end]) for b, t in zip(buffers, inputs, strict=True)
            ]
            base = parts.pop() if has_base else None
            yield Chunk(begin, ROW, parts[0], parts[1:], base)

    return read


def make(elements: int, kind: str) -> list[Tensor]:
    """mllm, reasoner and base in bfloat16."""
    torch.manual_seed(0)
    base = (torch.randn(elements) * 0.02).bfloat16()
    spread = 0.005 if kind == "normal" else 1e-4
    others = [(base + torch.randn(elements) * spread).bfloat16() for _ in range(2)]
    return [*others, base]


def seconds(name: str, variant: str, inputs: list[Tensor]) -> tuple[float, float]:
    """Of measure and combine."""
    method = METHODS[name]
    has_base = method.base == "required"
    read = reader(inputs if has_base else inputs[:2], has_base=has_base)
    shape = (inputs[0].numel() // ROW, ROW)
    weights = None if "weight" in method.defaults[variant] else [0.3]
    given = {"t": 0.5, "density": 0.2}
    options = {k: v for k, v in given.items() if k in method.required.get(variant, ())}
    settings = settings_for(name, shape, variant=variant, weights=weights, **options)
    out = torch.empty(BLOCK, dtype=torch.bfloat16)
    started = time.perf_counter()
    state = method.measure(read, settings) if method.measure else None
    middle = time.perf_counter()
    for chunk in read():
        result = method.combine(chunk, state, settings)
        out[: len(result)].copy_(result)
    return middle - started, time.perf_counter() - middle


def main() -> None:
    """Print one line per method, variant and kind of input."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("methods", nargs="*", default=list(METHODS))
    parser.add_argument("--elements", type=int, default=2**24)
    parser.add_argument("--runs", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, {args.elements:,} entries, ns per entry of the output")
    print("method           variant   inputs  measure  combine    all  a model")
    with torch.inference_mode():
        for kind in ("normal", "tied"):
            inputs = make(args.elements, kind)
            for name in args.methods:
                for variant in METHODS[name].variants:
                    found = [seconds(name, variant, inputs) for _ in range(args.runs)]
                    scale = 1e9 / args.elements
                    measure, combine = (scale * min(column) for column in zip(*found, strict=True))
                    models = 3 if METHODS[name].base == "required" else 2
                    both = scale * min(map(sum, found))
                    print(
                        f"{name:16} {variant:9} {kind:6} {measure:8.2f} {combine:8.2f} "
                        f"{both:6.2f} {both / models:8.2f}",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
