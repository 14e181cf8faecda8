"""Supervised fine-tuning with a prior: transformers' Trainer and a DriftCallback, nothing more.

For people without a trainer, and for our own proofs. No loop of its own; several processes are
accelerate's, as torchrun or `accelerate launch` start them.
"""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from drift_merge.errors import RecipeError
from drift_merge.storage import fingerprints
from drift_merge.storage.output import OutputDirectory
from drift_merge.storage.outputs.existing import Overwrite, check_output
from drift_merge.trainers.hf import DriftCallback
from drift_merge.trainers.sft.disk import full_disk_named
from drift_merge.trainers.sft.encode.check import check_conversations, check_lengths
from drift_merge.trainers.sft.encode.collator import Collator
from drift_merge.trainers.sft.encode.processor import load_processor
from drift_merge.trainers.sft.memory import require_disk
from drift_merge.trainers.sft.model import load_model
from drift_merge.trainers.sft.publish import MANIFEST, describe, write_output
from drift_merge.trainers.sft.ranks import first_does, rank, wait_for_all
from drift_merge.trainers.sft.request import (
    TrainingJob,
    TrainingRequest,
    enter_run,
    last_checkpoint,
    run_of,
)
from drift_merge.trainers.sft.watch import CompleteError, StepProgress, Watch, last_report
from drift_merge.trainers.wiring import optional

_INSTALL = "pip install 'drift_merge[train]'"
_transformers = optional("transformers", install=_INSTALL)
optional("accelerate", install=_INSTALL)  # the Trainer's own need

_LOGS = 200  # points of a curve
_OPTIMIZERS = {"adamw": "adamw_torch", "adamw_8bit": "adamw_8bit"}  # the Trainer's names


def train(
    prepared: TrainingJob,
    out: Path,
    *,
    resume: bool = False,
    overwrite: Overwrite = False,
    device: str = "cpu",
    progress: StepProgress = lambda step, total, log: None,
) -> dict[str, Any]:
    """Train, and publish a complete checkpoint or adapter with the course of its training.

    Args:
        prepared: the request.
        out: directory to create.
        resume: continue an unfinished run of the same request, exactly.
        overwrite: replace `out` after success.
        device: auto (cuda where there is one), cpu or cuda.
        progress: called after every optimizer step, in the first process.

    Returns:
        The manifest, as in `train.json`.

    Raises:
        OutputError: `out` exists, an unfinished run is in the way, or the disk is full.
        AlignmentError, VerificationError: the prior is not for this model.
    """
    _require_packages(prepared.request)
    _transformers.utils.logging.disable_progress_bar()
    run, plan = run_of(out), fingerprints.of_json(prepared.plan)
    arguments = _arguments(prepared, run, device)  # joins the other processes
    first_does(lambda: check_output(out, prepared.checkpoint.directories, overwrite=overwrite))
    with full_disk_named(run), _output(out, plan, overwrite=overwrite) as output:
        if first_does(lambda: output is not None and output.is_published):
            _tidy(run, output)  # killed when all was there, before this
            whole: dict[str, Any] = json.loads((out / MANIFEST).read_text())
            return whole
        last = first_does(lambda: _enter(run, prepared, resume=resume))
        with _kept_if_saved(run):
            trainer, callback = _trainer(prepared, last, arguments, progress)
            try:
                trainer.train(resume_from_checkpoint=str(last) if last else None)
            except CompleteError:
                trainer.callback_handler.on_train_end(arguments, trainer.state, trainer.control)
            report = None if callback is None else last_report(last) or callback.report
        history = trainer.state.log_history
        manifest = describe(prepared, history, report)
        write_output(prepared, trainer.model, manifest, history, output)
        if output is not None:
            output.publish(tidy=False)
        wait_for_all()
        _tidy(run, output)
    return manifest


def _tidy(run: Path, output: OutputDirectory | None) -> None:
    """Remove what is left beside a whole output, in the first process; the journal goes last."""
    if output is not None:
        shutil.rmtree(run, ignore_errors=True)
        output.tidy()


def _require_packages(request: TrainingRequest) -> None:
    if request.lora is not None:
        optional("peft", install="pip install 'drift_merge[lora]'")
    if request.optimizer == "adamw_8bit":
        optional("bitsandbytes", install="pip install 'drift_merge[bnb]'")


def _output(out: Path, plan: str, *, overwrite: Overwrite) -> Any:
    """The output being written, in the first process; nothing elsewhere."""
    return OutputDirectory(out, plan=plan, overwrite=overwrite) if rank() == 0 else nullcontext()


def _enter(run: Path, prepared: TrainingJob, *, resume: bool) -> Path | None:
    last = enter_run(run, prepared, resume=resume)
    require_disk(prepared, run)
    return last


@contextmanager
def _kept_if_saved(run: Path) -> Iterator[None]:
    """Remove the directory of a run that failed before there was anything to continue from."""
    try:
        yield
    except BaseException:
        if rank() == 0 and last_checkpoint(run) is None:
            shutil.rmtree(run, ignore_errors=True)
        raise


def _trainer(
    prepared: TrainingJob, last: Path | None, arguments: Any, progress: StepProgress
) -> tuple[Any, DriftCallback | None]:
    request = prepared.request
    processor = load_processor(prepared.directory, request.mllm)
    collator = Collator(processor, max_length=request.max_length)
    check_conversations(prepared.examples, processor)
    if request.max_length is not None:
        check_lengths(prepared.examples, collator, request.workers)
    _transformers.set_seed(request.seed)  # LoRA's factors are drawn, in every process alike
    model = load_model(prepared, last)
    if request.gradient_checkpointing and not model.supports_gradient_checkpointing:
        raise RecipeError(
            f"{type(model).__name__} cannot checkpoint its activations.",
            remedy="Add --no-gradient-checkpointing",
        )
    callback = _callback(request)
    trainer = _transformers.Trainer(
        model=model,
        args=arguments,
        train_dataset=prepared.examples,
        data_collator=collator,
        callbacks=[
            Watch(progress, request.save_total_limit, callback),
            *([callback] if callback else []),
        ],
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
        until=request.until,
        control=request.control,
    )


def _arguments(prepared: TrainingJob, run: Path, device: str) -> Any:
    request = prepared.request
    if request.workers:
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # workers are forked
    arguments = _transformers.TrainingArguments(
        output_dir=str(run),
        per_device_train_batch_size=request.batch_size,
        gradient_accumulation_steps=request.accumulation,
        max_steps=prepared.num_steps,
        learning_rate=request.peak_rate,
        lr_scheduler_type="cosine",
        warmup_steps=round(request.warmup * prepared.num_steps),
        weight_decay=request.weight_decay,
        max_grad_norm=request.max_grad_norm,
        optim=_OPTIMIZERS[request.optimizer],
        bf16=request.precision == "bf16",
        **_checkpointing(request),
        dataloader_num_workers=request.workers,
        logging_steps=-(-prepared.num_steps // _LOGS),
        logging_nan_inf_filter=False,
        save_strategy="steps",
        save_steps=request.save_steps,  # Watch removes the oldest
        report_to="none",
        remove_unused_columns=False,
        use_cpu=device == "cpu",
        dataloader_pin_memory=torch.cuda.is_available() and device != "cpu",
        disable_tqdm=True,
        seed=request.seed,
        **_sharding(request),
    )
    if arguments.n_gpu > 1:
        raise RecipeError(
            f"one process trains on one device, not on {arguments.n_gpu}.",
            remedy="Start one for each: torchrun --nproc-per-node"
            f" {arguments.n_gpu} --no-python drift-prior train ...   or set CUDA_VISIBLE_DEVICES=0",
        )
    return arguments


def _checkpointing(request: TrainingRequest) -> dict[str, Any]:
    known = {field.name for field in fields(_transformers.TrainingArguments)}
    name = "activation" if "activation_checkpointing" in known else "gradient"
    kwargs = {"use_reentrant": False} if request.gradient_checkpointing else None
    return {
        f"{name}_checkpointing": request.gradient_checkpointing,
        f"{name}_checkpointing_kwargs": kwargs,
    }


def _sharding(request: TrainingRequest) -> dict[str, Any]:
    if not request.fsdp:
        return {"ddp_find_unused_parameters": False} if request.processes > 1 else {}
    return {
        "fsdp": "full_shard auto_wrap" if int(_transformers.__version__[0]) < 5 else True,
        # Sharded adapters are saved by accelerate 1.15 and not loaded again.
        "fsdp_config": {
            "version": 2,
            "state_dict_type": "FULL_STATE_DICT" if request.lora else "SHARDED_STATE_DICT",
        },
    }
