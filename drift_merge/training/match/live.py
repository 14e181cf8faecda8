"""Lists the parameters of a live model by name and shape: tied, sharded, adapted or quantized.

Buffers of its state are listed too: a checkpoint stores them, so that a prior may hold them.

Reads no values. Shapes are those of the whole parameter, whatever of it this rank holds.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from drift_merge.errors import AlignmentError
from drift_merge.names.tensors import Model, Shape
from drift_merge.training.lora.layers import Adapted, find_adapted

LABEL = "the live model"
_QUANTISED = ("Params4bit", "Int8Params")  # bitsandbytes
_MODEL_KEYS = {"model_type", "text_config", "num_key_value_heads"}
_PACKED = ("qweight", "weight_packed")  # GPTQ and AWQ; compressed-tensors


@dataclass(frozen=True, slots=True)
class LiveModel:
    """The parameters of a model by name; a tied one under each of its names."""

    parameters: dict[str, nn.Parameter | None]  # None: a weight that is packed into other tensors
    buffers: dict[str, Tensor]  # persistent ones of floating point
    shapes: dict[str, Shape]  # of parameters and buffers
    adapted: dict[str, Adapted]  # base weights that PEFT trains through factors, by name
    config: Mapping[str, Any]  # transformers' config as plain data, or {}

    def tensor(self, name: str) -> Tensor | None:
        """A parameter or buffer; None where it is packed."""
        return self.buffers[name] if name in self.buffers else self.parameters[name]

    def model(self) -> Model:
        """What the alignment needs of it."""
        return Model(LABEL, dict(self.shapes), self.config)


def list_parameters(model: nn.Module, *, needs_values: bool = True) -> LiveModel:
    """List the parameters of a model.

    Args:
        model: wrapped or not.
        needs_values: refuse parameters on the meta device.

    Raises:
        AlignmentError: FSDP1 has flattened them, or some are on the meta device.
    """
    live = LiveModel({}, {}, {}, find_adapted(model), _config(model))
    for path, module in model.named_modules():
        _refuse_fsdp1(module)
        prefix = f"{path}." if path else ""
        for leaf, parameter in module._parameters.items():
            if parameter is not None:
                live.parameters[f"{prefix}{leaf}"] = parameter
                live.shapes[f"{prefix}{leaf}"] = _full_shape(parameter, module)
        if not any(hasattr(module, name) for name in _PACKED):
            for leaf, buffer in _buffers(module):
                live.buffers[f"{prefix}{leaf}"] = buffer
                live.shapes[f"{prefix}{leaf}"] = tuple(buffer.shape)
        elif shape := _features(module):
            live.parameters[f"{prefix}weight"] = None
            live.shapes[f"{prefix}weight"] = shape
    for name, adapted in live.adapted.items():
        live.parameters.setdefault(name, None)
        live.shapes[name] = adapted.shape
    _refuse_meta(live.parameters if needs_values else {})
    return live


def _buffers(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for leaf, buffer in module._buffers.items():
        is_stored = leaf not in module._non_persistent_buffers_set
        if buffer is not None and is_stored and buffer.is_floating_point():
            yield leaf, buffer


def checkpoint_of(model: nn.Module) -> str:
    """Where transformers has loaded a model from; MLLM where it does not say."""
    return str(_config(model).get("_name_or_path") or "MLLM")


def is_quantized(parameter: Tensor | None) -> bool:
    """Whether the values of a parameter are packed into integers (bitsandbytes, GPTQ, AWQ)."""
    if parameter is None:
        return True
    return type(parameter).__name__ in _QUANTISED or not parameter.is_floating_point()


def _config(model: nn.Module) -> Mapping[str, Any]:
    """The config of the outermost module that has one of a model (an engine has one of its own)."""
    for module in model.modules():
        config: Any = getattr(module, "config", None)
        plain = config.to_dict() if hasattr(config, "to_dict") else config
        if isinstance(plain, Mapping) and _MODEL_KEYS & plain.keys():
            return plain
    return {}


def _full_shape(parameter: nn.Parameter, module: nn.Module) -> Shape:
    if is_quantized(parameter) and (shape := _features(module)):
        return shape
    # ZeRO-3 leaves a parameter of shape (0,) behind and keeps the real one beside it.
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def _features(module: nn.Module) -> Shape | None:
    """(out, in) of a linear layer, which a packed weight does not show in its own shape."""
    for rows, cols in (("out_features", "in_features"), ("outfeatures", "infeatures")):
        shape: tuple[Any, Any] = (getattr(module, rows, None), getattr(module, cols, None))
        if all(isinstance(size, int) for size in shape):
            return shape
    return None


def _refuse_fsdp1(module: nn.Module) -> None:
    if type(module).__name__ == "FullyShardedDataParallel":
        raise AlignmentError(
            "the model is wrapped by FSDP1 (FullyShardedDataParallel), which flattens parameters.",
            remedy="Use FSDP2: torch.distributed.fsdp.fully_shard(model)"
            " (accelerate: fsdp_version: 2).",
        )


def _refuse_meta(parameters: dict[str, nn.Parameter | None]) -> None:
    names = [name for name, p in parameters.items() if p is not None and p.is_meta]
    if names:
        raise AlignmentError(
            f"{len(names):,} parameters are on the meta device, e.g. {names[0]}: they have no"
            " values yet.",
            remedy="Load or initialize the weights first, then call attach().",
        )
