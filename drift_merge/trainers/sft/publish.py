"""From a trained model to the output: a whole checkpoint, or an adapter, and its course."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from drift_merge.maths.dtypes import TORCH_DTYPES
from drift_merge.maths.rounding import round_stochastically
from drift_merge.recipes.words import NEAREST
from drift_merge.storage import fingerprints
from drift_merge.storage.manifests import describe_tool, to_json
from drift_merge.storage.output import OutputDirectory
from drift_merge.trainers.sft.curves import steps_of, to_csv, to_png
from drift_merge.trainers.sft.model import ADAPTER, base_model
from drift_merge.trainers.sft.ranks import rank
from drift_merge.trainers.sft.request import TrainingJob

MANIFEST, CSV, PNG = "train.json", "train.csv", "train.png"
History = list[dict[str, Any]]


def describe(
    prepared: TrainingJob, history: History, report: dict[str, Any] | None
) -> dict[str, Any]:
    """The manifest of a training."""
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


def write_output(
    prepared: TrainingJob,
    model: Any,
    manifest: dict[str, Any],
    history: History,
    output: OutputDirectory | None,
) -> None:
    """Fill the payload, and tell the manifest how much of the change the output keeps.

    Every process takes part, since weights may be sharded; the first one writes.

    Args:
        prepared: the request.
        model: as it was trained, wrapped or not.
        manifest: completed here by `change_kept`.
        history: what was logged.
        output: of the first process, None elsewhere.
    """
    learned = _learned(model)
    if prepared.request.lora is not None:
        manifest["change_kept"] = None
        _write_adapter(prepared, model, dict(learned), output)
    else:
        manifest["change_kept"] = _write_model(prepared, learned, output)
    if output is None:
        return
    output.write_file(CSV, to_csv(history))
    kind = "plain SFT" if prepared.request.prior is None else f"DRIFT, {prepared.request.rule}"
    picture = to_png(history, title=f"{prepared.checkpoint.source.label}: {kind}")
    if picture is not None:
        output.write_file(PNG, picture)
    output.write_file(MANIFEST, to_json(manifest))
    for path in output.payload.iterdir():
        if path.is_file():
            path.chmod((output.payload / MANIFEST).stat().st_mode)  # safetensors hides its own
            flush(path)


@torch.no_grad()
def _learned(model: Any) -> Iterator[tuple[str, Tensor]]:
    """Name and whole value of what was trained, on the host, one at a time."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            whole = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
            if rank() == 0:
                yield name, whole.detach().cpu()


@torch.no_grad()
def _write_model(
    prepared: TrainingJob,
    learned: Iterator[tuple[str, Tensor]],
    output: OutputDirectory | None,
) -> float | None:
    """The mllm's sidecars and the model in the output's dtype; what it keeps of the change.

    <rounded - start, trained - start> / |trained - start|^2 over all that was trained: weights
    begin on the grid of a 16-bit dtype, and small changes round back to where they began.
    """
    if output is None:
        for _ in learned:
            pass
        return None
    for name in prepared.checkpoint.sidecars:
        output.copy_file(
            name, prepared.directory / name, f"{prepared.checkpoint.source.given}: {name}"
        )
    model = base_model(prepared.directory, torch.float32)
    places = dict(model.named_parameters())
    kept = whole = 0.0
    for name, value in learned:
        begin = places[name].detach()
        rounded = _rounded(prepared, name, value)
        change = (value - begin).flatten()
        kept += float((rounded.float() - begin).flatten() @ change)
        whole += float(change @ change)
        places[name].copy_(rounded)  # float32 holds what a smaller dtype does
    model.to(_dtype(prepared)).save_pretrained(output.payload)
    return kept / whole if whole else None


def _write_adapter(
    prepared: TrainingJob,
    model: Any,
    learned: dict[str, Tensor],
    output: OutputDirectory | None,
) -> None:
    """PEFT's own folder, its factors in float32 unless a dtype was asked for."""
    if output is not None:
        dtype = torch.float32 if prepared.request.dtype == "source" else _dtype(prepared)
        state = {name: _rounded(prepared, name, value, dtype) for name, value in learned.items()}
        model.save_pretrained(output.payload, state_dict=state)
        path = output.payload / ADAPTER
        config = json.loads(path.read_bytes())
        if isinstance(config["target_modules"], list):  # PEFT writes a set, in any order
            config["target_modules"].sort()
        output.write_file(ADAPTER, (json.dumps(config, indent=2, sort_keys=True) + "\n").encode())


def _rounded(
    prepared: TrainingJob, name: str, values: Tensor, dtype: torch.dtype | None = None
) -> Tensor:
    """A trained parameter in the dtype of the output."""
    dtype = dtype or _dtype(prepared)
    if prepared.request.round == NEAREST:
        return values.to(dtype)
    key = fingerprints.key_of(prepared.request.seed, "round", name)
    return round_stochastically(values.flatten(), dtype, key, 0).view(values.shape)


def _dtype(prepared: TrainingJob) -> torch.dtype:
    code = prepared.output_dtype
    found: torch.dtype = TORCH_DTYPES.get(code) or getattr(torch, code)
    return found


def flush(path: Path) -> None:
    """Wait until a file, or the entries of a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
