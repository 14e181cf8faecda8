"""Print the table: python -m tests.families [--columns align,merge] [--json FILE] [NAME ...]."""

import argparse
import gc
import json
import tempfile
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import torch
import transformers

from tests.families.build import architectures
from tests.families.check import COLUMNS, Row, check


def main() -> None:
    """Check the architectures that are named, or all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--columns", default=",".join(COLUMNS))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    transformers.logging.disable_progress_bar()
    columns = tuple(options.columns.split(","))
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for kind in options.names or architectures():
            start = time.monotonic()
            rows.append(check(kind, Path(folder) / "case", columns))
            print(f"{show(rows[-1], columns)}  {time.monotonic() - start:.1f} s", flush=True)
            gc.collect()
    print(summary(rows, columns))
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1))


def show(row: Row, columns: tuple[str, ...] = COLUMNS) -> str:
    """Return the line of an architecture, and beneath it what is wrong."""
    if row.skipped:
        return f"{row.kind:<24} skipped: {row.skipped}"
    words = {c: "ok" if said == "right" else "NO" for c, said in row.columns.items()}
    marks = " ".join(f"{words.get(c, '-'):<7}" for c in columns)
    lines = [f"{row.kind:<24} {row.partner:<28} {marks}"]
    lines += [f"    {c}: {said}" for c, said in row.columns.items() if said != "right"]
    return "\n".join(lines)


def summary(rows: list[Row], columns: tuple[str, ...] = COLUMNS) -> str:
    """Return how many are right in each column and throughout, and what was skipped."""
    done = [row for row in rows if not row.skipped]
    plain = [row for row in done if not row.is_encoder_decoder]
    counts = Counter(c for row in plain for c in columns if row.columns[c] == "right")
    refused = sum(row.columns == {"align": "right"} for row in done if row.is_encoder_decoder)
    right = sum(all(row.columns[c] == "right" for c in columns) for row in plain)
    parts = [f"{c} {counts[c]}" for c in columns]
    return (
        f"\nof {len(plain)} architectures with a decoder tower: {', '.join(parts)}, all {right};"
        f" {refused} of {len(done) - len(plain)} encoder-decoders refused as such;"
        f" {len(rows) - len(done)} skipped"
    )


if __name__ == "__main__":
    main()
