"""Run the study: python -m tests.benchmarks.study --out DIR. Stopped at any moment, it goes on.

With --world smollm2 around SmolLM2-135M, some minutes a run, in a folder of its own.

Every run adds a line to results.jsonl: row, value, seed, split, what was right item by item. The
tables and figures are made from that file alone: python -m tests.benchmarks.study.report DIR
"""

import argparse
import json
import multiprocessing
import os
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from tests.benchmarks.study.rows import Row
from tests.benchmarks.study.stored import Stored, as_stored

RESULTS = "results.jsonl"


@dataclass(frozen=True, slots=True)
class Job:
    """One run."""

    row: Row
    value: float | None
    seed: int
    rate: float
    split: str

    @property
    def key(self) -> tuple[Any, ...]:
        return (self.row.name, self.value, self.seed, self.rate, self.split)


def read(out: Path) -> list[dict[str, Any]]:
    """The runs so far; a line that a kill has cut is left out."""
    found = []
    if (out / RESULTS).exists():
        for line in (out / RESULTS).read_text().splitlines():
            try:
                found.append(json.loads(line))
            except json.JSONDecodeError:
                continue
    return found


def _start(threads: int = 1) -> None:
    os.environ["OMP_NUM_THREADS"] = str(threads)
    import torch
    from transformers.utils import logging

    torch.set_num_threads(threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _do(world: str, job: Job, out: Path) -> dict[str, Any]:
    from tests.benchmarks.study.work import run
    from tests.benchmarks.study.worlds import WORLDS

    try:
        return run(WORLDS[world], job.row, job.value, job.seed, job.rate, job.split, out)
    except Exception as error:  # a row that fails must not end the others; it is in the report
        return {"error": f"{type(error).__name__}: {error}"}


def do_all(world: str, jobs: Iterable[Job], out: Path, processes: int) -> None:
    """Run what has no line yet; one line each, flushed."""
    done = {(r["row"], r["value"], r["seed"], r["rate"], r["split"]) for r in read(out)}
    left = [job for job in jobs if job.key not in done]
    context = multiprocessing.get_context("spawn")
    with (
        ProcessPoolExecutor(processes, mp_context=context, initializer=_start) as pool,
        open(out / RESULTS, "a") as file,
    ):
        futures = {pool.submit(_do, world, job, out): job for job in left}
        for number, future in enumerate(as_completed(futures), start=1):
            job = futures[future]
            head = dict(zip(("row", "value", "seed", "rate", "split"), job.key, strict=True))
            line = head | future.result()
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())
            said = line.get("error") or f"{share(line['picture_sums']):.3f}"
            print(
                f"{number}/{len(left)} {job.row.name} {job.value} seed {job.seed}: {said}",
                flush=True,
            )


def share(bits: str) -> float:
    return bits.count("1") / len(bits)


def best_values(rows: Iterable[Row], results: Iterable[Stored], rate: float) -> dict[str, float]:
    """By row: the value with the most right sums on validation; the smallest of equals."""
    scores: dict[str, dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
    for run in results:
        if (run.split, run.rate, run.error) == ("validation", rate, "") and run.value is not None:
            scores[run.row][run.value].append(run.share("picture_sums"))
    means = {row: {v: mean(found) for v, found in by.items()} for row, by in scores.items()}
    return {
        row.name: max(sorted(means[row.name]), key=means[row.name].__getitem__)
        for row in rows
        if row.choices and row.name in means
    }


def best_rate(results: Iterable[Stored]) -> float:
    """The learning rate that is best for SFT on validation."""
    scores: dict[float, list[float]] = defaultdict(list)
    for run in results:
        if (run.row, run.split, run.error) == ("SFT", "validation", ""):
            scores[run.rate].append(run.share("picture_sums"))
    return max(sorted(scores), key=lambda rate: mean(scores[rate]))


def final_jobs(
    rows: Iterable[Row], chosen: dict[str, float], rate: float, seeds: int
) -> Iterator[Job]:
    """By seeds first: stopped early, every row has about as many of them."""
    listed = list(rows)
    for seed in range(seeds):
        for row in listed:
            if seed < (row.seeds if row.is_trained else 1):
                yield Job(row, row.value(chosen), seed, rate, "test")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m tests.benchmarks.study")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--world", choices=("tiny", "smollm2"), default="tiny")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--rows", default="", help="only rows whose name holds this")
    options = parser.parse_args()
    started = time.monotonic()
    options.out.mkdir(parents=True, exist_ok=True)
    from tests.benchmarks.study.work import prepare
    from tests.benchmarks.study.worlds import WORLDS

    world = WORLDS[options.world]
    _start(world.threads)
    prepare(world, options.out, lambda line: print(line, flush=True))

    def do(jobs: Iterable[Job]) -> list[Stored]:
        do_all(options.world, jobs, options.out, options.processes)
        return as_stored(read(options.out))

    rows = [row for row in world.rows if options.rows in row.name]
    sft = next(row for row in world.rows if row.name == "SFT")
    tuned = [
        Job(sft, None, seed, rate, "validation")
        for rate in world.rates
        for seed in world.tuning_seeds
    ]
    rate = best_rate(do(tuned))
    # The value of each row with choices is the best on validation, with the first tuning seed.
    tried = [
        Job(row, value, world.tuning_seeds[0], rate, "validation")
        for row in rows
        for value in row.choices
    ]
    chosen = best_values(rows, do(tried), rate)
    do(final_jobs(rows, chosen, rate, options.seeds))
    print(f"{time.monotonic() - started:.0f} s; learning rate {rate}; chosen: {chosen}")
