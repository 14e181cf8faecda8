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
from drift_merge.errors import RecipeError
from drift_merge.storage.outputs.existing import check_output
from drift_merge.trainers.sft.request import TrainingRequest, prepare_training
from drift_merge.training.options import ATTACH_OPTIONS

Report = Callable[[int, int, Mapping[str, Any]], None]


_BIASING = ("alpha", "negate", "rule", "modules", "layers", "schedule")  # of attach()'s options


def _parse_alpha(_: click.Context, __: click.Parameter, text: str) -> float | dict[str, float]:
    """Click callback: `1.0`, or `attn=1.0,mlp=0.5`."""
    try:
        if "=" not in str(text):
            return float(text)
        pairs = (word.split("=") for word in text.split(","))
        return {module.strip(): float(value) for module, value in pairs}
    except ValueError as error:
        raise click.BadParameter(f"{text!r} is neither a number nor attn=X,mlp=Y.") from error


_prior_options = options.chain(
    click.option("--prior", help="Directory or Hub id of the prior."),
    click.option("--no-prior", is_flag=True, help="Plain fine-tuning, to compare with."),
    *(
        options.click_option(
            option, default, callback=_parse_alpha if option.name == "alpha" else None
        )
        for option, default in (ATTACH_OPTIONS[name] for name in _BIASING)
    ),
)
_training_options = options.chain(
    click.option(
        "--epochs", type=float, default=1.0, show_default=True, metavar="X", help="Over the data."
    ),
    click.option(
        "--steps",
        type=click.IntRange(min=1),
        metavar="N",
        help="Steps of the optimizer; instead of --epochs.",
    ),
    click.option(
        "--lr",
        "learning_rate",
        type=float,
        default=1e-6,
        show_default=True,
        metavar="X",
        help="Peak learning rate; a cosine brings it to 0.",
    ),
    click.option(
        "--warmup",
        type=click.FloatRange(0, 1),
        default=0.03,
        show_default=True,
        metavar="FRACTION",
        help="Of the steps, with a rising learning rate.",
    ),
    click.option(
        "--weight-decay",
        type=float,
        default=0.0,
        show_default=True,
        metavar="X",
        help="Of AdamW.",
    ),
    click.option(
        "--max-grad-norm",
        type=float,
        default=1.0,
        show_default=True,
        metavar="X",
        help="Clip the gradient before the bias; 0: do not.",
    ),
    click.option(
        "--batch-size",
        type=click.IntRange(min=1),
        default=1,
        show_default=True,
        metavar="N",
        help="Examples in a backward pass.",
    ),
    click.option(
        "--accumulation",
        type=click.IntRange(min=1),
        default=1,
        show_default=True,
        metavar="N",
        help="Backward passes in a step of the optimizer.",
    ),
    click.option(
        "--precision",
        type=click.Choice(["fp32", "bf16"]),
        default="fp32",
        show_default=True,
        help="Of activations; weights and AdamW are float32.",
    ),
    click.option("--train-all", is_flag=True, help="Vision tower and connector are trained too."),
    click.option(
        "--seed",
        type=int,
        default=0,
        show_default=True,
        metavar="N",
        help="Of the order of the examples.",
    ),
    click.option(
        "--save-steps",
        type=click.IntRange(min=1),
        default=100,
        show_default=True,
        metavar="N",
        help="Steps from one checkpoint to the next; two are kept in OUT.run.",
    ),
    click.option("--resume", is_flag=True, help="Continue an unfinished run, exactly."),
)


@click.command()
@click.argument("mllm")
@click.option(
    "--data",
    type=options.PATH,
    required=True,
    metavar="FILE",
    help='JSON Lines: {"image": PATH, "question": TEXT, "answer": TEXT}; paths relative to FILE.',
)
@_prior_options
@_training_options
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
@click.option("-n", "--dry-run", is_flag=True, help="Check the inputs, print the plan and stop.")
@options.json_option
@options.quiet_option
def train(mllm: str, prior: str | None, no_prior: bool, **values: Any) -> None:
    """Fine-tune an MLLM on images, questions and answers, biased towards a reasoner.

    AdamW, a cosine schedule, labels on the answers alone, by transformers' Trainer in one process;
    for more use DriftCallback in your own trainer. Needs: pip install 'drift_merge[train]'

    Guide: drift-prior guide own-trainer

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
    prepared = prepare_training(TrainingRequest(mllm=mllm, prior=prior, **values), quiet=is_silent)
    if run["dry_run"]:
        check_output(out, prepared.checkpoint.directories, overwrite=run["overwrite"])
        _print_plan(prepared.plan, prepared.num_steps, as_json=run["as_json"])
        return
    require_device(run["device"].replace("auto", "cpu"))
    # What libraries print must not mix with the answer.
    with redirect_stdout(sys.stderr), _progress(quiet=is_silent) as progress:
        from drift_merge.trainers.sft.run import train as run_training

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
            " changes rounded back to the mllm's values.\n  To keep it on average, with noise:"
            " --round stochastic. To keep all: --dtype float32"
        )
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
