"""Supervised fine-tuning with a prior: what is asked, what it is made of, where it got to.

    OUT.run/        the trainer's checkpoints, until OUT is published; plan.json says of what
    OUT.partial/    what will become OUT, as for every command

Needs no transformers; `sft_run` trains.
"""

import json
import math
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from shlex import quote
from typing import Any

from drift_merge.errors import OutputError
from drift_merge.recipes.sources import fetch_carried
from drift_merge.recipes.words import NEAREST
from drift_merge.storage import fingerprints
from drift_merge.storage.checkpoint import Checkpoint, open_checkpoint
from drift_merge.storage.manifests import to_json
from drift_merge.trainers.sft.examples import Example, read_examples
from drift_merge.training.deltas.controls import read_control
from drift_merge.training.deltas.files import load_prior
from drift_merge.training.options import OWN_RULE, RULE_TRAITS
from drift_merge.training.schedules import checked_until, directed, strength_of

PLAN, WHOLE = "plan.json", "whole"  # whole: written into a checkpoint after all the rest


@dataclass(frozen=True, slots=True)
class TrainingRequest:
    """What is trained, on what and how. Everything here decides the result."""

    mllm: str
    data: Path
    prior: str | None  # None: plain supervised fine-tuning
    alpha: float | str | dict[str, float] | None = None  # None: the rule's default
    negate: bool = False
    rule: str = "adaptive_cosine"
    modules: str = "attn,mlp"
    layers: str | None = None
    schedule: str | None = None  # constant
    until: float | None = None
    control: str | None = None
    epochs: float = 1.0
    steps: int | None = None  # optimizer steps; overrides epochs
    learning_rate: float = 1e-6  # peak; cosine to 0
    warmup: float = 0.03  # fraction of the steps
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0  # 0: no clipping
    batch_size: int = 1
    accumulation: int = 1
    precision: str = "fp32"  # or bf16: autocast; weights and AdamW are float32 in both
    dtype: str = "source"  # of the output
    round: str = NEAREST  # to 16 bits; or "stochastic", drawn by `seed`
    train_all: bool = False  # vision tower and connector too
    seed: int = 0
    save_steps: int = 100


@dataclass(frozen=True, slots=True)
class TrainingJob:
    """A request whose inputs were opened."""

    request: TrainingRequest
    checkpoint: Checkpoint
    examples: list[Example]
    num_steps: int  # of the optimizer
    plan: dict[str, Any]  # plain data: what a resumed run must share

    @property
    def directory(self) -> Path:
        """Where the mllm's files are."""
        assert self.checkpoint.path is not None
        return self.checkpoint.path


def prepare_training(request: TrainingRequest, *, quiet: bool = False) -> TrainingJob:
    """Open and check the inputs; a Hub id is downloaded.

    Raises:
        SourceError, CheckpointError, RecipeError, VerificationError.
    """
    _require_strength(request)
    examples = read_examples(request.data)
    checkpoint = open_checkpoint(request.mllm, quiet=quiet)
    fetch_carried(checkpoint)
    seal = None if request.prior is None else load_prior(request.prior).manifest.get("seal")
    batches = -(-len(examples) // request.batch_size)
    per_epoch = -(-batches // request.accumulation)
    plan = asdict(request) | {
        "data": fingerprints.of_bytes(request.data.read_bytes()),
        "mllm": fingerprints.of_layout(checkpoint),
        "prior": seal,
        "num_examples": len(examples),
    }
    num_steps = request.steps or max(1, math.ceil(round(request.epochs * per_epoch, 6)))
    return TrainingJob(request, checkpoint, examples, num_steps, plan)


def _require_strength(request: TrainingRequest) -> None:
    """Refuse what `attach` would refuse, before a model is loaded."""
    alpha = strength_of(request.alpha, request.rule, RULE_TRAITS.get(request.rule, OWN_RULE))
    alphas = alpha if isinstance(alpha, Mapping) else {"all modules": alpha}
    directed(alphas, negate=request.negate)
    checked_until(request.until)
    read_control(request.control)


def run_of(out: Path) -> Path:
    """Where the trainer keeps its checkpoints until `out` is published: beside it."""
    final = Path(os.path.realpath(out))
    return final.with_name(f"{final.name}.run")


def last_checkpoint(run: Path) -> Path | None:
    """The last checkpoint that was written to its end."""
    found = {
        int(match[1]): path
        for path in (run.iterdir() if run.is_dir() else ())
        if (match := re.fullmatch(r"checkpoint-(\d+)", path.name)) and (path / WHOLE).exists()
    }
    return found[max(found)] if found else None


def enter_run(run: Path, prepared: TrainingJob, *, resume: bool) -> Path | None:
    """Make the directory of the run, or find where an earlier one got to.

    Returns:
        The checkpoint to continue from, None to begin.

    Raises:
        OutputError: an unfinished run is in the way: `resume` was not asked for, or it is another.
    """
    last, discard = last_checkpoint(run), f"rm -r {quote(str(run))}"
    if run.exists() and not resume:
        where = f"up to step {last.name.partition('-')[2]}" if last else "without a checkpoint"
        raise OutputError(
            f"{run} holds an unfinished run, {where} of {prepared.num_steps:,}.",
            remedy=f"Continue it: add --resume. Or discard it: {discard}",
        )
    known = run / PLAN
    if last is not None and json.loads(known.read_bytes()) != json.loads(to_json(prepared.plan)):
        raise OutputError(
            f"{run} holds an unfinished run with other inputs or options.",
            remedy=f"Repeat that command with --resume, or discard it: {discard}",
        )
    if last is None:
        shutil.rmtree(run, ignore_errors=True)
        run.mkdir(parents=True)
        known.write_bytes(to_json(prepared.plan))
    for path in run.glob("checkpoint-*"):
        if path != last and not (path / WHOLE).exists():
            shutil.rmtree(path)
    return last
