"""What `drift-prior train` does: check, train, show progress, say what came of it."""

import gc
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

from drift_merge.cli.entry import OFTEN, print_json
from drift_merge.cli.options import require_device
from drift_merge.cli.render import note, table
from drift_merge.storage.output import check_output
from drift_merge.training.sft import Request, prepare


def train_action(mllm: str, prior: str | None, values: dict[str, Any]) -> None:
    """Check, train, and say what came of it."""
    out: Path = values.pop("output")
    names = ("device", "overwrite", "dry_run", "as_json", "quiet", "resume")
    run = {name: values.pop(name) for name in names}
    is_silent = run["quiet"] or run["as_json"]
    prepared = prepare(Request(mllm=mllm, prior=prior, **values), quiet=is_silent)
    if run["dry_run"]:
        check_output(out, prepared.checkpoint.directories, overwrite=run["overwrite"])
        _print_plan(prepared.plan, prepared.num_steps, as_json=run["as_json"])
        return
    require_device(run["device"].replace("auto", "cpu"))
    # What libraries print must not mix with the answer.
    with redirect_stdout(sys.stderr), _progress(quiet=is_silent) as progress:
        from drift_merge.training.sft_run import train as run_training

        gc.set_threshold(*OFTEN)  # tensors that hang in a cycle must not wait for long
        manifest = run_training(
            prepared,
            out,
            resume=run["resume"],
            overwrite=run["overwrite"],
            device=run["device"],
            progress=progress,
        )
    if run["as_json"]:
        print_json({"schema": 1, "output": str(out), **manifest})
        return
    if not run["quiet"]:
        _describe(manifest, out)
    print(out)


def _print_plan(plan: dict[str, Any], num_steps: int, *, as_json: bool) -> None:
    if as_json:
        print_json({"schema": 1, "num_steps": num_steps, **plan})
        return
    rows = [[key, str(value)] for key, value in plan.items() if value is not None]
    table(["option", "value"], [["optimizer steps", f"{num_steps:,}"], *rows])
    note("Nothing was written (--dry-run).")


def _describe(manifest: dict[str, Any], out: Path) -> None:
    loss = manifest["loss"]
    if loss is not None:
        note(f"Loss {loss['first']:.4f} -> {loss['last']:.4f} in {manifest['num_steps']:,} steps.")
    kept = manifest["change_kept"]
    if kept is not None and abs(kept - 1.0) > 0.1:
        note(
            f"Warning [rounding]: the output dtype keeps {kept:.0%} of what was learned; smaller"
            " changes rounded back to the mllm's values.\n  To keep all of it: --dtype float32"
        )
    if not (out / "train.png").exists():
        note(
            "No train.png: matplotlib is not installed. For pictures: pip install"
            " 'drift_merge[report]'. The numbers are in train.csv."
        )


Report = Callable[[int, int, Mapping[str, Any]], None]


@contextmanager
def _progress(*, quiet: bool) -> Iterator[Report]:
    """A bar on a terminal, a line every tenth elsewhere, nothing when quiet."""
    if quiet:
        yield lambda step, total, log: None
    elif sys.stderr.isatty():
        yield from _bar()
    else:
        yield _lines


def _bar() -> Iterator[Report]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("Training"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=None)
        yield lambda step, total, log: bar.update(
            task, completed=step, total=total, description=_numbers(log)
        )


def _lines(step: int, total: int, log: Mapping[str, Any]) -> None:
    if 10 * step // total > 10 * (step - 1) // total:
        note(f"Training: step {step:,} of {total:,}  {_numbers(log)}")


def _numbers(log: Mapping[str, Any]) -> str:
    shown = (("loss", "loss"), ("cosine", "drift/cosine"), ("bias/g", "drift/bias_ratio"))
    return "  ".join(f"{label} {log[key]:.4g}" for label, key in shown if key in log)
