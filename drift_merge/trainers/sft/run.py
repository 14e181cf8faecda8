"""Supervised fine-tuning with a prior: transformers' Trainer and a DriftCallback, nothing more.

For people without a trainer, and for our own proofs. No loop of its own, one process.
"""

import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from drift_merge.errors import RecipeError
from drift_merge.maths.dtypes import TORCH_DTYPES
from drift_merge.maths.rounding import round_stochastically
from drift_merge.names.tensors import Model
from drift_merge.names.towers import canonical_names
from drift_merge.recipes.words import NEAREST
from drift_merge.storage import fingerprints
from drift_merge.storage.manifests import describe_tool, to_json
from drift_merge.storage.output import OutputDirectory
from drift_merge.storage.outputs.existing import Overwrite, check_output
from drift_merge.trainers.hf import DriftCallback
from drift_merge.trainers.sft.curves import steps_of, to_csv, to_png
from drift_merge.trainers.sft.disk import full_disk_named
from drift_merge.trainers.sft.examples import Collator, load_processor
from drift_merge.trainers.sft.request import (
    WHOLE,
    TrainingJob,
    TrainingRequest,
    enter_run,
    last_checkpoint,
    run_of,
)
from drift_merge.trainers.wiring import optional

_INSTALL = "pip install 'drift_merge[train]'"
_transformers = optional("transformers", install=_INSTALL)
optional("accelerate", install=_INSTALL)  # the Trainer's own need

MANIFEST, CSV, PNG = "train.json", "train.csv", "train.png"
_LOGS = 200  # points of a curve

StepProgress = Callable[[int, int, Mapping[str, Any]], None]  # step, of how many, last log


def train(
    prepared: TrainingJob,
    out: Path,
    *,
    resume: bool = False,
    overwrite: Overwrite = False,
    device: str = "cpu",
    progress: StepProgress = lambda step, total, log: None,
) -> dict[str, Any]:
    """Train, and publish a complete checkpoint with the course of its training.

    Args:
        prepared: the request.
        out: directory to create.
        resume: continue an unfinished run of the same request, exactly.
        overwrite: replace `out` after success.
        device: auto (cuda where there is one), cpu or cuda.
        progress: called after every optimizer step.

    Returns:
        The manifest, as in `train.json`.

    Raises:
        OutputError: `out` exists, an unfinished run is in the way, or the disk is full.
        AlignmentError, VerificationError: the prior is not for this model.
    """
    check_output(out, prepared.checkpoint.directories, overwrite=overwrite)
    _transformers.utils.logging.disable_progress_bar()
    run, plan = run_of(out), fingerprints.of_json(prepared.plan)
    with (
        full_disk_named(run),
        OutputDirectory(out, plan=plan, overwrite=overwrite) as output,
    ):
        last = enter_run(run, prepared, resume=resume)
        with _kept_if_saved(run):
            trainer, callback = _trainer(prepared, last, run, device, progress)
            trainer.train(resume_from_checkpoint=str(last) if last else None)
        report = None if callback is None else callback.report
        manifest = _describe(prepared, trainer.state.log_history, report)
        manifest["change_kept"] = _change_kept(prepared, trainer.model)
        _write(prepared, trainer.model, manifest, trainer.state.log_history, output)
        output.publish()
    shutil.rmtree(run, ignore_errors=True)
    return manifest


@contextmanager
def _kept_if_saved(run: Path) -> Iterator[None]:
    """Remove the directory of a run that failed before there was anything to continue from."""
    try:
        yield
    except BaseException:
        if last_checkpoint(run) is None:
            shutil.rmtree(run, ignore_errors=True)
        raise


class _Watch(_transformers.TrainerCallback):  # type: ignore[misc, name-defined]
    """Reports progress, and marks checkpoints that are whole."""

    def __init__(self, progress: StepProgress) -> None:
        self._progress = progress
        self._log: dict[str, Any] = {}

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._progress(state.global_step, state.max_steps, self._log)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        self._log = dict(logs or {})

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        folder = Path(args.output_dir, f"checkpoint-{state.global_step}")
        for path in folder.rglob("*"):
            _flush(path)
        (folder / WHOLE).touch()


def _trainer(
    prepared: TrainingJob, last: Path | None, run: Path, device: str, progress: StepProgress
) -> tuple[Any, DriftCallback | None]:
    request = prepared.request
    arguments = _arguments(prepared, run, device)
    if arguments.world_size != 1 or arguments.n_gpu > 1:
        raise RecipeError(
            f"this command trains in one process on one device, not on {arguments.world_size} x"
            f" {max(1, arguments.n_gpu)}.",
            remedy="Set CUDA_VISIBLE_DEVICES=0, or use DriftCallback in your own trainer.",
        )
    processor = load_processor(prepared.directory, request.mllm)
    # The trainer does not load a checkpoint whose names on the disk differ from those in memory.
    model = _transformers.AutoModelForImageTextToText.from_pretrained(
        last or prepared.directory, dtype=torch.float32
    )
    if not request.train_all:
        _freeze_outside_tower(model, prepared.checkpoint.config, request.mllm)
    callback = _callback(request)
    trainer = _transformers.Trainer(
        model=model,
        args=arguments,
        train_dataset=prepared.examples,
        data_collator=Collator(processor),
        callbacks=[_Watch(progress), *([callback] if callback else [])],
    )
    for kind in (_transformers.PrinterCallback, _transformers.trainer_callback.ProgressCallback):
        trainer.remove_callback(kind)  # they print to stdout
    return trainer, callback


def _callback(request: TrainingRequest) -> DriftCallback | None:
    if request.prior is None:
        return None
    return DriftCallback(
        request.prior,
        alpha=request.alpha,
        negate=request.negate,
        rule=request.rule,
        modules=request.modules,
        layers=request.layers,
        schedule=request.schedule,
    )


def _arguments(prepared: TrainingJob, run: Path, device: str) -> Any:
    request = prepared.request
    return _transformers.TrainingArguments(
        output_dir=str(run),
        per_device_train_batch_size=request.batch_size,
        gradient_accumulation_steps=request.accumulation,
        max_steps=prepared.num_steps,
        learning_rate=request.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=round(request.warmup * prepared.num_steps),
        weight_decay=request.weight_decay,
        max_grad_norm=request.max_grad_norm,
        optim="adamw_torch",
        bf16=request.precision == "bf16",
        logging_steps=-(-prepared.num_steps // _LOGS),
        logging_nan_inf_filter=False,
        save_strategy="steps",
        save_steps=request.save_steps,
        save_total_limit=2,  # the one that is being written may be lost
        report_to="none",
        remove_unused_columns=False,
        use_cpu=device == "cpu",
        dataloader_pin_memory=torch.cuda.is_available() and device != "cpu",
        disable_tqdm=True,
        seed=request.seed,
    )


def _freeze_outside_tower(model: Any, config: Mapping[str, Any], label: str) -> None:
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    tower = canonical_names(Model(label, shapes, config)).canonical
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in tower)


def _describe(
    prepared: TrainingJob, history: list[dict[str, Any]], report: dict[str, Any] | None
) -> dict[str, Any]:
    losses = [log["loss"] for log in steps_of(history)]
    return {
        "kind": "drift-train",
        "format_version": 1,
        "tool": describe_tool(),
        "plan": prepared.plan | {"prior_source": prepared.request.prior},
        "num_steps": prepared.num_steps,
        "loss": {"first": losses[0], "last": losses[-1]} if losses else None,
        "report": report,
    }


def _write(
    prepared: TrainingJob,
    model: Any,
    manifest: dict[str, Any],
    history: list[dict[str, Any]],
    output: OutputDirectory,
) -> None:
    """Fill the payload: the mllm's sidecars, the model, the course of the training."""
    for name in prepared.checkpoint.sidecars:
        output.copy_file(
            name, prepared.directory / name, f"{prepared.checkpoint.source.given}: {name}"
        )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:  # what the dtype holds exactly, it keeps as it is
                parameter.copy_(_rounded(prepared, name, parameter))
    model.to(_dtype(prepared)).save_pretrained(output.payload)
    output.write_file(CSV, to_csv(history))
    kind = "plain SFT" if prepared.request.prior is None else f"DRIFT, {prepared.request.rule}"
    picture = to_png(history, title=f"{prepared.checkpoint.source.label}: {kind}")
    if picture is not None:
        output.write_file(PNG, picture)
    output.write_file(MANIFEST, to_json(manifest))
    for path in output.payload.iterdir():
        if path.is_file():
            path.chmod((output.payload / MANIFEST).stat().st_mode)  # safetensors hides its own
            _flush(path)


@torch.no_grad()
def _change_kept(prepared: TrainingJob, model: Any) -> float | None:
    """How much of what was learned the output dtype keeps; None if nothing moved.

    <rounded - start, trained - start> / |trained - start|^2 over all that was trained: weights
    begin on the grid of a 16-bit dtype, and small changes round back to where they began.
    """
    load = _transformers.AutoModelForImageTextToText.from_pretrained
    start = dict(load(prepared.directory, dtype="auto").named_parameters())
    kept = whole = 0.0
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            begin = start[name].to(parameter.device, torch.float32).flatten()
            change = parameter.flatten() - begin
            rounded = _rounded(prepared, name, parameter).flatten().float() - begin
            kept, whole = kept + float(rounded @ change), whole + float(change @ change)
    return kept / whole if whole else None


def _rounded(prepared: TrainingJob, name: str, parameter: torch.Tensor) -> torch.Tensor:
    """A trained parameter in the dtype of the output."""
    dtype, values = _dtype(prepared), parameter.detach()
    if prepared.request.round == NEAREST:
        return values.to(dtype)
    key = fingerprints.key_of(prepared.request.seed, "round", name)
    return round_stochastically(values.flatten(), dtype, key, 0).view(values.shape)


def _dtype(prepared: TrainingJob) -> torch.dtype:
    """The dtype of the output; `source`: that of most of the mllm's elements."""
    if prepared.request.dtype != "source":
        dtype: torch.dtype = getattr(torch, prepared.request.dtype)
        return dtype
    counts: Counter[str] = Counter()
    for info in prepared.checkpoint.tensors.values():
        counts[info.dtype] += info.numel
    return TORCH_DTYPES[counts.most_common(1)[0][0]]


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
