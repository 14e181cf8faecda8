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
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from shlex import quote
from typing import Any

from drift_merge.errors import OutputError, RecipeError
from drift_merge.recipes.sources import fetch_carried
from drift_merge.recipes.words import NEAREST
from drift_merge.storage import fingerprints
from drift_merge.storage.checkpoint import Checkpoint, open_checkpoint
from drift_merge.storage.headers import DTYPE_BITS
from drift_merge.storage.manifests import to_json
from drift_merge.trainers.sft.data.pictures import check_pictures
from drift_merge.trainers.sft.data.read import Examples, count_kinds, fingerprint_of, read_examples
from drift_merge.trainers.sft.trained import Trained, trained_of
from drift_merge.training.deltas.controls import read_control
from drift_merge.training.deltas.opened import load_prior
from drift_merge.training.options import OWN_RULE, RULE_TRAITS
from drift_merge.training.schedules import checked_until, directed, strength_of

PLAN, WHOLE = "plan.json", "whole"  # whole: written into a checkpoint after all the rest
OPTIMIZERS = ("adamw", "adamw_8bit")
_NO_MATTER = ("workers", "save_total_limit")  # the result is the same: a resumed run may differ
_ITEMSIZES = {"float32": 4, "bfloat16": 2, "float16": 2}


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
    learning_rate: float | None = None  # peak, cosine to 0; None: 1e-6, with LoRA 1e-4
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
    save_total_limit: int = 2
    lora: int | None = None  # rank; None: the weights themselves are trained
    optimizer: str = "adamw"  # one of OPTIMIZERS
    gradient_checkpointing: bool = True
    max_length: int | None = None  # tokens of an example, those of images included
    workers: int = 0  # processes that prepare batches
    processes: int = 1  # that train together; batch_size is of each
    fsdp: bool = False  # weights, gradients and optimizer are sharded over them

    @property
    def peak_rate(self) -> float:
        """The learning rate that is meant."""
        given = self.learning_rate
        return given if given is not None else 1e-4 if self.lora else 1e-6


@dataclass(frozen=True, slots=True)
class TrainingJob:
    """A request whose inputs were opened."""

    request: TrainingRequest
    checkpoint: Checkpoint
    examples: Examples
    num_steps: int  # of the optimizer
    plan: dict[str, Any]  # plain data: what a resumed run must share
    trained: Trained
    notes: tuple[str, ...]  # on the data, for people

    @property
    def directory(self) -> Path:
        """Where the mllm's files are."""
        assert self.checkpoint.path is not None
        return self.checkpoint.path

    @property
    def output_dtype(self) -> str:
        """Stored code of the output's dtype; `source`: that of most of the mllm's elements."""
        if self.request.dtype != "source":
            return self.request.dtype
        counts: Counter[str] = Counter()
        for info in self.checkpoint.tensors.values():
            counts[info.dtype] += info.numel
        return counts.most_common(1)[0][0]

    @property
    def output_itemsize(self) -> int:
        """Bytes of an element of the output."""
        return _ITEMSIZES.get(self.output_dtype) or DTYPE_BITS[self.output_dtype] // 8


def prepare_training(request: TrainingRequest, *, quiet: bool = False) -> TrainingJob:
    """Open and check the inputs; a Hub id is downloaded.

    Raises:
        SourceError, CheckpointError, RecipeError, VerificationError.
    """
    _require_strength(request)
    _check_together(request)
    examples = read_examples(request.data)
    pictures, num_pictures, is_opened = check_pictures(examples)
    checkpoint = open_checkpoint(request.mllm, quiet=quiet)
    fetch_carried(checkpoint)
    seal = None if request.prior is None else load_prior(request.prior).manifest.get("seal")
    batches = -(-len(examples) // (request.batch_size * request.processes))
    per_epoch = -(-batches // request.accumulation)
    decides = {key: value for key, value in asdict(request).items() if key not in _NO_MATTER}
    plan = decides | {
        "learning_rate": request.peak_rate,
        "data": fingerprint_of(request.data),
        "images": pictures,
        "num_images": num_pictures,
        "mllm": fingerprints.of_layout(checkpoint),
        "prior": seal,
        "num_examples": len(examples),
        **count_kinds(examples),
    }
    num_steps = request.steps or max(1, math.ceil(round(request.epochs * per_epoch, 6)))
    shapes = {name: info.shape for name, info in checkpoint.tensors.items()}
    trained = trained_of(request.mllm, shapes, checkpoint.config)
    notes = _notes(examples, is_opened=is_opened)
    return TrainingJob(request, checkpoint, examples, num_steps, plan, trained, notes)


def _check_together(request: TrainingRequest) -> None:
    """Refuse options that exclude each other."""
    if request.lora and request.train_all:
        raise RecipeError(
            "--lora adapts the language tower alone; --train-all trains everything.",
            remedy="Leave one of them out.",
        )
    if request.fsdp and request.processes == 1:
        raise RecipeError(
            "--fsdp shards over several processes, and this is one.",
            remedy="Start it with: torchrun --nproc-per-node N --no-python drift-prior train ...",
        )
    if request.fsdp and request.optimizer == "adamw_8bit":
        raise RecipeError(
            "--optimizer adamw_8bit does not take sharded parameters (--fsdp).",
            remedy="Leave --fsdp or --optimizer out; --fsdp divides the state by the number of"
            " processes.",
        )


def _notes(examples: Examples, *, is_opened: bool) -> tuple[str, ...]:
    unused = examples.unused()
    notes = [f"Fields of the data that are not used: {', '.join(unused)}."] if unused else []
    if not is_opened:
        notes.append("The images were read and not opened: pip install 'drift_merge[train]'")
    return tuple(notes)


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
