"""The tensors that an adapter stores: pairs of factors by module, and modules stored whole."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from drift_merge.storage.adapters.fields import AdapterConfig
from drift_merge.storage.adapters.refusals import damaged
from drift_merge.storage.adapters.selection import is_adapted, is_saved, rank_of, scale_of
from drift_merge.storage.headers import ShardHeader, TensorInfo, read_header
from drift_merge.storage.quantized import FLOATS
from drift_merge.storage.sources import Source
from drift_merge.storage.weight_map import ADAPTER_CONFIG, ADAPTER_WEIGHTS, holds_model

_OTHER_FILE = (
    f"{ADAPTER_CONFIG} and {ADAPTER_WEIGHTS} are of different adapters: download both again."
)
_PREFIX = "base_model.model."
_FACTOR = re.compile(
    r"(.+)\.(?:lora_([AB])(?:\.default)?\.weight|lora_(magnitude)_vector(?:\.default)?(?:\.weight)?)"
)
_FOREIGN = re.compile(r"\.(?:lora_|token_adapter\.|ia3_|vera_|base_layer\.)")


@dataclass(frozen=True, slots=True)
class Factors:
    """What is stored for one module: W = W_base + scale * B @ A, scaled by rows under DoRA.

    Those of a convolution have more dimensions.
    """

    a: TensorInfo  # (rank, inputs)
    b: TensorInfo  # (outputs, rank)
    magnitude: TensorInfo | None  # DoRA: (outputs,), the norm of every row of W
    scale: float

    @property
    def shape(self) -> tuple[int, int]:
        """(outputs, inputs) of the module."""
        return self.b.shape[0], self.a.shape[1]


@dataclass(frozen=True, slots=True)
class StoredTensors:
    """The weights of an adapter, by the names that modules and tensors have in memory."""

    header: ShardHeader
    factors: Mapping[str, Factors]  # by module
    whole: Mapping[str, TensorInfo]  # by tensor: of modules_to_save


def is_adapter(source: Source) -> bool:
    """Whether a source is a PEFT directory on this disk.

    One that holds a whole model too is that model, as transformers has it.
    """
    if source.path is None or not (source.path / ADAPTER_CONFIG).is_file():
        return False
    files = [path.name for path in source.path.iterdir()]
    return "config.json" not in files or not holds_model(files)


def read_factors(source: Source, config: AdapterConfig) -> StoredTensors:
    """Read the header of an adapter's weights and check it against the fields.

    Raises:
        CheckpointError: no safetensors file, a damaged one, a tensor that is neither a factor nor
            of `modules_to_save`, half a pair, empty factors, or shapes that are not the fields'.
    """
    assert source.path is not None
    path = source.path / ADAPTER_WEIGHTS
    if not path.is_file():
        raise damaged(
            config.label,
            f"it has no {ADAPTER_WEIGHTS}",
            remedy="Save the adapter as safetensors: model.save_pretrained(DIR)",
        )
    header = read_header(path, f"{config.label}/{ADAPTER_WEIGHTS}")
    found: dict[str, dict[str, TensorInfo]] = {}
    whole: dict[str, TensorInfo] = {}
    for stored, info in header.tensors.items():
        _require_data(config, info)
        name = stored.removeprefix(_PREFIX)
        if match := _FACTOR.fullmatch(name):
            found.setdefault(match[1], {})[match[2] or match[3]] = info
        elif _FOREIGN.search(name) or not is_saved(config.saved, name):
            raise config.reject(
                f"it stores {stored}, which is neither a factor of a linear layer nor of a module"
                " that modules_to_save names"
            )
        else:
            whole[name] = info
    factors = {module: _join(config, module, parts) for module, parts in found.items()}
    _require_saved(config, whole)
    if not factors and not whole:
        raise damaged(config.label, f"{ADAPTER_WEIGHTS} lists no tensor")
    return StoredTensors(header, factors, whole)


def _require_data(config: AdapterConfig, info: TensorInfo) -> None:
    if 0 in info.shape:
        raise damaged(
            config.label,
            f"{info.name} is empty: its shape is {info.shape}. It was saved by one process of"
            " DeepSpeed ZeRO-3 or FSDP, which held no part of it",
            remedy="Save it again where it was trained, with all parts gathered:\n"
            "model.save_pretrained(DIR, state_dict=accelerator.get_state_dict(model))",
        )
    if info.dtype not in FLOATS:
        raise damaged(
            config.label,
            f"{info.name} has dtype {info.dtype}; expected one of {', '.join(sorted(FLOATS))}",
        )


def _join(config: AdapterConfig, module: str, parts: Mapping[str, TensorInfo]) -> Factors:
    expected = {"A", "B"} | ({"magnitude"} if config.use_dora else set())
    if set(parts) != expected:
        names = ", ".join(sorted(info.name for info in parts.values()))
        wanted = "A, B and magnitudes (use_dora: not plain LoRA)" if config.use_dora else "A and B"
        raise damaged(config.label, f"for {module} it stores {names}; expected {wanted}")
    if not is_adapted(config, module):
        raise damaged(
            config.label,
            f"it stores factors for {module}, which its fields (target_modules, exclude_modules,"
            " layers_to_transform, layers_pattern, modules_to_save) do not choose; PEFT would leave"
            " them out",
            remedy=_OTHER_FILE,
        )
    a, b, rank = parts["A"], parts["B"], rank_of(config, module)
    if (a.shape[:1], b.shape[1:2]) != ((rank,), (rank,)):
        raise damaged(
            config.label,
            f"r and rank_pattern give {module} rank {rank}, but A is {a.shape} and B is {b.shape};"
            f" expected ({rank}, inputs) and (outputs, {rank})",
            remedy=_OTHER_FILE,
        )
    magnitude = parts.get("magnitude")
    if magnitude is not None and magnitude.shape != b.shape[:1]:
        raise damaged(
            config.label, f"{magnitude.name} is {magnitude.shape}; expected {b.shape[:1]}"
        )
    return Factors(a, b, magnitude, scale_of(config, module))


def _require_saved(config: AdapterConfig, whole: Mapping[str, TensorInfo]) -> None:
    """Every word of `modules_to_save` has a tensor."""
    for word in config.saved:
        if not any(is_saved((word,), name) for name in whole):
            raise damaged(
                config.label,
                f"modules_to_save names {word}, but {ADAPTER_WEIGHTS} has no tensor of it",
            )
