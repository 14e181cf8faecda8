"""The engines: functions from the toy's directory and settings to a `Trainer`, one per rank."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from tests.real_engines import toy

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(slots=True)
class Trainer:
    """An engine at work."""

    model: nn.Module  # what attach() gets
    optimizer: Any  # what attach() gets
    step: Callable[[Tensor], None]  # one optimizer step; tokens (ACCUMULATION, ROWS, TOKENS)
    weights: Callable[[], toy.Weights]  # whole, on every rank
    data_ranks: tuple[int, int]  # this rank among those with different data, and their number


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    """Two groups, as trainers make them for weight decay; nothing that is frozen."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [{"params": [p for p in trained if (p.ndim > 1) is flag]} for flag in (True, False)]
    return torch.optim.SGD(groups, lr=toy.LEARNING_RATE, momentum=toy.MOMENTUM)


def plain_steps(
    model: nn.Module, optimizer: torch.optim.Optimizer, *, set_to_none: bool = True
) -> Callable[[Tensor], None]:
    """The loop that everybody writes."""

    def step(tokens: Tensor) -> None:
        for micro in tokens:
            (model(micro) / toy.ACCUMULATION).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none)

    return step


def weights_of(model: nn.Module) -> toy.Weights:
    return {name.removeprefix("module."): whole(p) for name, p in model.named_parameters()}


def whole(values: Tensor) -> Tensor:
    """A copy of a tensor without its shards."""
    values = values.detach()
    return (values.full_tensor() if isinstance(values, DTensor) else values).clone()


def rank_and_world() -> tuple[int, int]:
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


def load(directory: Path, change: str | None = None) -> toy.Toy:
    """The toy; with `change` the last element of that parameter is another one."""
    model = toy.load(directory)
    if change:
        with torch.no_grad():
            model.get_parameter(change).view(-1)[-1] += 0.5
    return model


def ddp(directory: Path, *, is_view: bool = False) -> Trainer:
    model = DistributedDataParallel(toy.load(directory), gradient_as_bucket_view=is_view)
    optimizer = sgd(model)
    steps = plain_steps(model, optimizer)
    return Trainer(model, optimizer, steps, lambda: weights_of(model), rank_and_world())


def fsdp(
    directory: Path,
    *,
    mesh: tuple[int, ...] | None = None,
    tensor_parallel: bool = False,
    dtype: str = "fp32",
    is_reshard: bool = True,
    set_to_none: bool = True,
    change: str | None = None,
) -> Trainer:
    """FSDP2 by layer and root; a mesh of two dimensions is HSDP, or FSDP by TP."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    model = load(directory, change)
    names = ("replicate", "shard") if not tensor_parallel else ("shard", "tensor")
    whole_mesh = init_device_mesh("cpu", mesh, mesh_dim_names=names) if mesh else None
    own, data = whole_mesh, rank_and_world()
    if tensor_parallel:
        assert whole_mesh is not None
        own = whole_mesh["shard"]
        parallelize(model, whole_mesh["tensor"])
        data = own.get_local_rank(), own.size()
    options: dict[str, Any] = {"reshard_after_forward": is_reshard}
    if own is not None:
        options["mesh"] = own
    if dtype != "fp32":
        options["mp_policy"] = MixedPrecisionPolicy(DTYPES[dtype], reduce_dtype=torch.float32)
    for layer in model.model.language_model.layers:
        fully_shard(layer, **options)
    fully_shard(model, **options)
    optimizer = sgd(model)
    steps = plain_steps(model, optimizer, set_to_none=set_to_none)
    return Trainer(model, optimizer, steps, lambda: weights_of(model), data)


def tensor_parallel(directory: Path) -> Trainer:
    """Column- and row-wise shards; attention and the rest stay plain; all ranks see all data."""
    model = toy.load(directory)
    parallelize(model, init_device_mesh("cpu", (rank_and_world()[1],)))
    optimizer = sgd(model)
    return Trainer(
        model, optimizer, plain_steps(model, optimizer), lambda: weights_of(model), (0, 1)
    )


def parallelize(model: toy.Toy, mesh: Any) -> None:
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    plan = {
        "mlp.gate_proj": ColwiseParallel(),
        "mlp.up_proj": ColwiseParallel(),
        "mlp.down_proj": RowwiseParallel(),
    }
    for layer in model.model.language_model.layers:
        parallelize_module(layer, mesh, plan)


def deepspeed(
    directory: Path,
    *,
    stage: int,
    dtype: str = "fp32",
    is_offloaded: bool = False,
    options: dict[str, Any] | None = None,  # of zero_optimization
    accumulate_in: str | None = None,
    clip: float = 0.0,
    give: str = "engine",
    loss_scale: float = 0,
    first_scale_power: int = 16,
    change: str | None = None,
    named_optimizer: str | None = None,  # one of DeepSpeed's, in the place of SGD
    before: Callable[[toy.Toy], None] = lambda model: None,
) -> Trainer:
    import deepspeed as ds

    # It would compile a shared-memory operation: minutes, a compiler, and a lock that a killed
    # run leaves behind for ever.
    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # type: ignore[attr-defined]
    _, world = rank_and_world()
    model = load(directory, change)
    before(model)
    zero: dict[str, Any] = {"stage": stage} | (options or {})
    if is_offloaded:
        zero["offload_optimizer"] = {"device": "cpu"}
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": toy.ROWS,
        "gradient_accumulation_steps": toy.ACCUMULATION,
        "train_batch_size": toy.ROWS * toy.ACCUMULATION * world,
        "gradient_clipping": clip,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    if dtype == "bf16":
        config["bf16"] = {"enabled": True}
    if dtype == "fp16":
        # Refused on CPUs without the instructions, though torch computes it on any.
        type(ds.accelerator.get_accelerator()).is_fp16_supported = lambda self: True
        config["fp16"] = {
            "enabled": True,
            "loss_scale": loss_scale,  # 0 for a dynamic one
            "initial_scale_power": first_scale_power,
            "hysteresis": 1,
        }
    if accumulate_in:
        config["data_types"] = {"grad_accum_dtype": accumulate_in}
    if named_optimizer:
        config["optimizer"] = {"type": named_optimizer, "params": {"lr": 1e-3}}
    engine, optimizer, _, _ = ds.initialize(
        model=model,
        optimizer=None if named_optimizer else sgd(model),
        model_parameters=model.parameters() if named_optimizer else None,
        config=config,
        dist_init_required=False,
    )

    def step(tokens: Tensor) -> None:
        for micro in tokens:
            engine.backward(engine(micro))
            engine.step()

    def weights() -> toy.Weights:
        return {
            name: _master(optimizer, parameter)
            for name, parameter in engine.module.named_parameters()
        }

    models = {"engine": (engine, engine), "optimizer": (engine.module, optimizer)}
    attached, given = models[give]
    return Trainer(attached, given, step, weights, rank_and_world())


def _master(optimizer: Any, parameter: nn.Parameter) -> Tensor:
    """The fp32 values that DeepSpeed steps on."""
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param

    if parameter.dtype == torch.float32 and not hasattr(parameter, "ds_id"):
        return parameter.detach().clone()
    values = safe_get_full_fp32_param(parameter)
    if values is not None:
        return values.detach().clone()
    if hasattr(parameter, "ds_id"):  # frozen
        with deepspeed.zero.GatheredParameters([parameter]):
            return parameter.detach().clone()
    pairs = zip(
        getattr(optimizer, "fp16_groups", []), getattr(optimizer, "fp32_groups", []), strict=True
    )
    for low, high in pairs:  # ZeRO-0 in bf16 or fp16
        for ours, master in zip(low, high, strict=True):
            if ours is parameter:
                return master.detach().clone()
    return parameter.detach().clone()


ENGINES: dict[str, Callable[..., Trainer]] = {
    "ddp": ddp,
    "fsdp": fsdp,
    "tensor_parallel": tensor_parallel,
    "deepspeed": deepspeed,
}
