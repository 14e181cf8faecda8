"""`drift-prior train`: a minimal supervised fine-tuning with a prior."""

import gc
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import click

from drift_merge.cli import config_file, options
from drift_merge.cli.entry import OFTEN, print_json
from drift_merge.cli.render import note, table
from drift_merge.cli.running import require_device
from drift_merge.cli.training_options import prior_options, training_options
from drift_merge.errors import RecipeError
from drift_merge.storage.outputs.existing import check_output
from drift_merge.storage.processes import num_cores
from drift_merge.storage.sizes import size
from drift_merge.trainers.sft.memory import (
    ASSUMED_LENGTH,
    memory_of,
    require_memory,
    room_of,
    summary,
)
from drift_merge.trainers.sft.request import TrainingJob, TrainingRequest, prepare_training

Report = Callable[[int, int, Mapping[str, Any]], None]


_WORKERS = 4  # that prepare batches for a GPU


@click.command()
@click.argument("mllm")
@click.option(
    "--data",
    type=options.PATH,
    required=True,
    metavar="PATH",
    help="Conversations: JSON Lines, JSON, Parquet or a folder; see drift-prior guide train.",
)
@prior_options
@training_options
@click.option(
    "-o",
    "--output",
    type=options.PATH,
    callback=config_file.require_output,
    help="Directory to create.  [required]",
)
@click.option(
    "--dtype",
    type=click.Choice(["source", "float32", "bfloat16", "float16"]),
    default="source",
    show_default=True,
    help="Of the output; source keeps the mllm's.",
)
@options.recipe("linear", "round")
@click.option(
    "--device",
    type=click.Choice(["auto", "cpu", "cuda"]),
    default="auto",
    show_default=True,
    help="auto: cuda where there is one.",
)
@options.overwrite_option
@click.option(
    "-n",
    "--dry-run",
    is_flag=True,
    help="Check the inputs, print the plan, what memory and disk it needs, and stop.",
)
@options.json_option
@options.quiet_option
def train(mllm: str, prior: str | None, no_prior: bool, **values: Any) -> None:
    """Fine-tune an MLLM on conversations with images, biased towards a reasoner.

    AdamW, a cosine schedule, labels on the assistant's turns alone, by transformers' Trainer; for
    more use DriftCallback in your own trainer. Several processes: torchrun --nproc-per-node N
    --no-python drift-prior train ..., or accelerate launch. Needs: pip install 'drift_merge[train]'

    Guide: drift-prior guide train

    \b
    Example:
        drift-prior train MLLM --data data.jsonl --prior prior/ -o trained/
    """
    if (prior is None) is not no_prior:
        raise RecipeError(
            "give one of --prior and --no-prior.",
            remedy="E.g. --prior prior/   (make one with: drift-prior compute REASONER MLLM)",
        )

    train_action(mllm, prior, values)


def train_action(mllm: str, prior: str | None, values: dict[str, Any]) -> None:
    """Check, train, and say what came of it."""
    out: Path = values.pop("output")
    names = ("device", "overwrite", "dry_run", "as_json", "quiet", "resume")
    run = {name: values.pop(name) for name in names}
    is_silent = run["quiet"] or run["as_json"]
    if values["workers"] is None:
        values["workers"] = 0 if run["device"] == "cpu" else min(_WORKERS, num_cores())
    from drift_merge.trainers.sft.ranks import adopt_mpi, local_processes, num_processes, rank

    adopt_mpi()
    request = TrainingRequest(mllm=mllm, prior=prior, processes=num_processes(), **values)
    prepared = prepare_training(request, quiet=is_silent)
    room = room_of(run["device"], local_processes())
    if run["dry_run"]:
        check_output(out, prepared.checkpoint.directories, overwrite=run["overwrite"])
        _print_plan(prepared, room, as_json=run["as_json"])
        require_memory(prepared, room)
        return
    require_device(run["device"].replace("auto", "cpu"))
    require_memory(prepared, room)
    is_first = rank() == 0
    # What libraries print must not mix with the answer.
    with redirect_stdout(sys.stderr), _progress(quiet=is_silent) as progress:
        from drift_merge.trainers.sft.run import train as run_training

        gc.set_threshold(*OFTEN)  # tensors that hang in a cycle must not wait for long
        if is_first:
            _say(prepared, room)
        manifest = run_training(
            prepared,
            out,
            resume=run["resume"],
            overwrite=run["overwrite"],
            device=run["device"],
            progress=progress,
        )
    if not is_first:
        return
    if run["as_json"]:
        print_json({"schema": 1, "output": str(out), **manifest})
        return
    if not run["quiet"]:
        _describe(manifest, out)
    print(out)


def _print_plan(prepared: TrainingJob, room: int | None, *, as_json: bool) -> None:
    estimate = summary(prepared, room)
    if as_json:
        plan = {"schema": 1, "num_steps": prepared.num_steps, **prepared.plan}
        print_json(plan | {"estimate": estimate})
        return
    rows = [[key, str(value)] for key, value in prepared.plan.items() if value is not None]
    table(["option", "value"], [["optimizer steps", f"{prepared.num_steps:,}"], *rows])
    need = memory_of(prepared.request, prepared.trained)
    table(["memory of a process", "bytes"], need.rows())
    table(["disk", "bytes"], [[key, size(value)] for key, value in estimate["disk"].items()])
    _say(prepared, room)
    note("Nothing was written (--dry-run).")


def _say(prepared: TrainingJob, room: int | None) -> None:
    """What should be known before the first step."""
    for text in prepared.notes:
        note(text)
    need = memory_of(prepared.request, prepared.trained)
    if room is not None and need.exact <= room < need.total:
        length = prepared.request.max_length or ASSUMED_LENGTH
        note(
            f"Warning [memory]: an estimated {size(need.total)} of {size(room)} that are free, for"
            f" {length:,} tokens an example. To need less: --max-length, --batch-size 1, --lora 16"
        )


def _describe(manifest: dict[str, Any], out: Path) -> None:
    loss = manifest["loss"]
    if loss is not None:
        note(f"Loss {loss['first']:.4f} -> {loss['last']:.4f} in {manifest['num_steps']:,} steps.")
    kept = manifest["change_kept"]
    if kept is not None and abs(kept - 1.0) > 0.1:
        note(
            f"Warning [rounding]: the output dtype keeps {kept:.0%} of what was learned; smaller"
            " changes rounded back to the mllm's values.\n  To keep it on average, with noise:"
            " --round stochastic. To keep all: --dtype float32"
        )
    if manifest["plan"]["lora"]:
        note("OUT is an adapter: PeftModel.from_pretrained(MLLM, OUT).")
    if not (out / "train.png").exists():
        note(
            "No train.png: matplotlib is not installed. For pictures: pip install"
            " 'drift_merge[report]'. The numbers are in train.csv."
        )


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
