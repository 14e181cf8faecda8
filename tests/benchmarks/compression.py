"""What compressing a prior costs and keeps: a table of dtype, size, cosine and time.

    python tests/benchmarks/compression.py PRIOR [--runs N] [--threads N] [--folder DIR]

PRIOR is one that `drift-prior compute` has made, best in float32, so that the rounding of the
others is all there is. Cosines are of delta as PRIOR holds it and its other form, over all tensors
as one vector and of the worst tensor; measured here in float64, apart from what the manifest says
(which must agree). "write" is `drift-prior compress` in this process, checks and flushes included;
"read" is all of it into float32, rows at a time, on one thread. Medians of the runs. The table is
Markdown.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))

from drift_merge.engine.job import RunOptions
from drift_merge.priors.compress import compress_prior, compress_recipe, plan_compression
from drift_merge.priors.deltas import Deltas, open_deltas
from drift_merge.priors.manifest import Prior, open_prior
from drift_merge.priors.summary import stored_cosines
from drift_merge.storage.forms.compressed import COMPRESSED

CHUNK = 2**18  # elements, in whole rows


@dataclass
class Sums:
    """Of delta and its other form, float64."""

    product: float = 0.0
    exact: float = 0.0
    stored: float = 0.0

    def add(self, exact: Tensor, stored: Tensor) -> None:
        one, other = exact.double().flatten(), stored.double().flatten()
        self.product += float(one @ other)
        self.exact += float(one @ one)
        self.stored += float(other @ other)

    @property
    def cosine(self) -> float:
        scale = sqrt(self.exact) * sqrt(self.stored)
        return self.product / scale if scale else 1.0


Other = Callable[[str, int, int, Tensor], Tensor]  # name, rows, and delta -> its other form


def ranges(deltas: Deltas) -> Iterator[tuple[str, int, int]]:
    """Every row of every delta, in chunks."""
    for name in deltas.shapes:
        rows, cols = deltas.matrix(name)
        step = max(1, CHUNK // max(cols, 1))
        yield from ((name, begin, min(begin + step, rows)) for begin in range(0, rows, step))


def cosines(deltas: Deltas, other: Other) -> tuple[float, float, str]:
    """Overall, worst, and the name of the worst tensor."""
    total, by_name = Sums(), {name: Sums() for name in deltas.shapes}
    for name, begin, end in ranges(deltas):
        exact = deltas.read(name, begin, end).float()
        form = other(name, begin, end, exact)
        total.add(exact, form)
        by_name[name].add(exact, form)
    worst = min(by_name, key=lambda name: by_name[name].cosine)
    return total.cosine, by_name[worst].cosine, worst


def timed(work: Callable[[], object], runs: int) -> float:
    """Median seconds."""
    found = []
    for _ in range(runs):
        started = time.perf_counter()
        work()
        found.append(time.perf_counter() - started)
    return median(found)


def read_all(deltas: Deltas) -> None:
    buffer = torch.empty(0)
    for name, begin, end in ranges(deltas):
        size = (end - begin) * deltas.matrix(name)[1]
        if buffer.numel() < size:
            buffer = torch.empty(size)
        out = buffer[:size].view(end - begin, -1)
        deltas.read(name, begin, end, out)


def compress(prior: Prior, dtype: str, out: Path, threads: int) -> Prior:
    plan = plan_compression(prior, compress_recipe(prior, dtype=dtype))
    options = RunOptions(threads=threads, overwrite=True)
    return compress_prior(prior, plan, out, options).prior


def rows_of(prior: Prior, folder: Path, runs: int, threads: int) -> Iterator[list[str]]:
    """The cells of the table."""
    numel = prior.manifest["num_elements"]
    with open_deltas(prior) as exact:
        size = prior.manifest["size_bytes"]
        read = timed(lambda: read_all(exact), runs) / numel
        name = f"{prior.manifest['parameters']['dtype']} (as given)"
        yield cells(name, size, numel, (1.0, 1.0, ""), None, read)
        found = cosines(exact, lambda _n, _b, _e, delta: delta.bfloat16())
        yield cells("bfloat16 (rounded in memory)", 2 * numel, numel, found, None, None)
        for dtype in COMPRESSED:
            out = folder / dtype
            write = timed(lambda: compress(prior, dtype, out, threads), runs)  # noqa: B023
            made = open_prior(out)
            with open_deltas(made) as stored:
                reading = stored.read
                found = cosines(exact, lambda n, b, e, _: reading(n, b, e))  # noqa: B023
                read = timed(lambda: read_all(stored), runs) / numel
            kept = stored_cosines(made.tensors)
            assert kept is not None
            # The manifest's worst may be another tensor of almost the same cosine.
            assert abs(kept.cosine - found[0]) < 1e-6, (kept, found)
            assert abs(kept.worst - found[1]) < 1e-6, (kept, found)
            yield cells(dtype, made.manifest["size_bytes"], numel, found, write, read)


def cells(
    name: str,
    size: int,
    numel: int,
    found: tuple[float, float, str],
    write: float | None,
    read: float | None,
) -> list[str]:
    """One row as text."""
    overall, worst, worst_name = found
    return [
        name,
        f"{size / 1e6:,.1f} MB",
        f"{size / numel:.3f}",
        f"{overall:.6f}",
        f"{worst:.6f}" + (f" ({worst_name})" if worst_name else ""),
        "" if write is None else f"{write:.2f} s",
        "" if read is None else f"{read * 1e9:.2f} ns",
    ]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("prior", type=Path)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="for the outputs; removed at the end")
    args = parser.parse_args()
    torch.set_num_threads(1)
    prior = open_prior(args.prior)
    names = ["dtype", "size", "bytes an element", "cosine, all", "cosine, worst tensor"]
    names += ["write", "read, an element"]
    print(f"torch {torch.__version__}; {prior.manifest['num_elements']:,} elements, "
          f"{len(prior.tensors):,} tensors")  # fmt: skip
    print(f"| {' | '.join(names)} |")
    print("|---|--:|--:|--:|---|--:|--:|")
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        for row in rows_of(prior, Path(folder), args.runs, args.threads):
            print(f"| {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
