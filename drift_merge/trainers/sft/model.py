"""The model that is trained: loaded, frozen outside the tower, given LoRA's factors."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from drift_merge.errors import AlignmentError
from drift_merge.names.modules import layer_of
from drift_merge.names.tensors import Model
from drift_merge.names.towers import canonical_names
from drift_merge.trainers.sft.request import TrainingJob
from drift_merge.trainers.sft.trained import is_adapted
from drift_merge.trainers.wiring import optional

ADAPTER = "adapter_config.json"
_ALPHA_PER_RANK = 2  # LoRA's scale is alpha / rank, so that it does not depend on the rank


def load_model(prepared: TrainingJob, last: Path | None) -> Any:
    """The model as a run begins, or as a checkpoint has it; what is not trained is frozen.

    Args:
        prepared: the request.
        last: the checkpoint to go on from. The trainer itself does not load one whose names on
            the disk differ from those in memory.
    """
    request = prepared.request
    is_whole = last is not None and any(last.glob("model*.safetensors"))
    # LoRA's base takes no step: autocast would make the 16-bit copy of it anyway.
    is_half = request.lora is not None and request.precision == "bf16"
    model = base_model(
        last if is_whole and last is not None else prepared.directory,
        torch.bfloat16 if is_half else torch.float32,
    )
    if request.fsdp:
        model._no_split_modules = _layer_classes(model, prepared)
    if request.lora is not None:
        return _with_factors(model, prepared, request.lora, last)
    if not request.train_all:
        tower = _tower(model, prepared)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in tower)
    return model


def base_model(directory: Path, dtype: torch.dtype) -> Any:
    """An MLLM from its folder."""
    transformers = optional("transformers", install="pip install 'drift_merge[train]'")
    # Unsaid, transformers asks on the terminal whether to run the checkpoint's own code.
    return transformers.AutoModelForImageTextToText.from_pretrained(
        directory, dtype=dtype, trust_remote_code=False, use_safetensors=True
    )


def _tower(model: nn.Module, prepared: TrainingJob) -> Mapping[str, str]:
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    label = prepared.request.mllm
    return canonical_names(Model(label, shapes, prepared.checkpoint.config)).canonical


def _layer_classes(model: nn.Module, prepared: TrainingJob) -> list[str]:
    """Classes of the tower's layers, each of which FSDP shards as one.

    What the model itself names for this may be classes that this size of it does not have.
    """
    tower = _tower(model, prepared)
    layered = {name for name, canonical in tower.items() if layer_of(canonical) is not None}
    found: dict[str, str] = {}  # path of a layer -> its class
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList):
            for number, layer in module.named_children():
                own = f"{path}.{number}."
                is_inner = any(own.startswith(f"{outer}.") for outer in found)
                if not is_inner and any(name.startswith(own) for name in layered):
                    found[f"{path}.{number}"] = type(layer).__name__
    return sorted(set(found.values()))


def _with_factors(model: Any, prepared: TrainingJob, rank: int, last: Path | None) -> Any:
    """The model with LoRA on every matrix of its tower's layers."""
    peft = optional("peft", install="pip install 'drift_merge[lora]'")
    if last is not None and (last / ADAPTER).exists():
        return peft.PeftModel.from_pretrained(model, last, is_trainable=True)
    tower, linear = _tower(model, prepared), {}
    for path, module in model.named_modules():
        canonical = tower.get(f"{path}.weight")
        if isinstance(module, nn.Linear) and canonical is not None:
            linear[path] = is_adapted(canonical, tuple(module.weight.shape))
    targets = sorted(path for path, is_target in linear.items() if is_target)
    if not targets:
        raise AlignmentError(
            "the language tower has no linear layers in memory that LoRA could adapt.",
            remedy="Train the weights themselves: leave --lora out.",
        )
    config = peft.LoraConfig(
        r=rank, lora_alpha=_ALPHA_PER_RANK * rank, target_modules=targets, task_type="CAUSAL_LM"
    )
    adapted = peft.get_peft_model(model, config)
    adapted.peft_config["default"].base_model_name_or_path = prepared.request.mllm
    return adapted
