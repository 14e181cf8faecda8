"""A LoRA adapter (PEFT directory) on its base, as one checkpoint: W = W_base + s * B @ A.

Nothing is computed here: the checkpoint lists the base's tensors and, for each that the adapter
changes, where its factors are. The engine adds the product chunk by chunk.

Source: LoRA, arXiv 2106.09685, section 4.1 (s = alpha / r); rsLoRA, arXiv 2312.03732
(s = alpha / sqrt(r)).
"""

import json
import os
import re
from collections.abc import Mapping
from dataclasses import replace
from math import sqrt
from pathlib import Path
from typing import Any

from drift_merge.errors import CheckpointError, RecipeError
from drift_merge.storage.checkpoint import Checkpoint, StoredAdapter, assemble
from drift_merge.storage.headers import ShardHeader, TensorInfo, read_header
from drift_merge.storage.sources import Source

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
_FACTOR = re.compile(r"(?:base_model\.model\.)?(.+)\.lora_([AB])(?:\.default)?\.weight")


def is_adapter(source: Source) -> bool:
    """Whether a source is a local PEFT directory."""
    return source.path is not None and (source.path / ADAPTER_CONFIG).is_file()


def base_of(source: Source) -> str:
    """The base that an adapter names.

    Raises:
        RecipeError: it names none.
    """
    base = _read_config(source).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise RecipeError(
            f"{source.given} is a LoRA adapter that names no base.",
            remedy="Name it: --base BASE",
        )
    return base


def join_adapter(source: Source, base: Checkpoint) -> Checkpoint:
    """The base with the adapter's factors beside its tensors.

    Raises:
        CheckpointError: not plain LoRA (DoRA, embeddings, whole tensors), or factors that fit no
            tensor of the base.
    """
    assert source.path is not None
    config = _read_config(source)
    if config.get("peft_type", "LORA") != "LORA" or config.get("use_dora"):
        raise _unsupported(source, "it is not plain LoRA (DoRA or another kind)")
    path = source.path / ADAPTER_WEIGHTS
    if not path.is_file():
        raise CheckpointError(
            f"{source.given} has no {ADAPTER_WEIGHTS}.",
            remedy="Save the adapter as safetensors: model.save_pretrained(DIR)",
        )
    factors = read_header(path, ADAPTER_WEIGHTS)
    adapters = _match(source, config, factors.tensors, base)
    here = {name: header for name, header in base.shards.items() if name not in base.remote}
    shards = [_absolute(base.file(name), header) for name, header in here.items()]
    # A shard that is on the Hub has no path yet; the place where it will be names it as well.
    shards += [_renamed(r.place, base.shards[name]) for name, r in base.remote.items()]
    joined = assemble(source, Path("/"), base.config, [*shards, _absolute(path, factors)], ())
    remote = {shard.place: shard for shard in base.remote.values()}
    return replace(joined, adapters=adapters, remote=remote)


def _match(
    source: Source, config: Mapping[str, Any], factors: Mapping[str, TensorInfo], base: Checkpoint
) -> dict[str, StoredAdapter]:
    pairs: dict[str, dict[str, TensorInfo]] = {}
    for name, info in factors.items():
        match = _FACTOR.fullmatch(name)
        if match is None:
            raise _unsupported(source, f"it holds {name}, which is no factor of a linear layer")
        pairs.setdefault(match[1], {})[match[2]] = info
    adapters = {}
    for module, found in pairs.items():
        name = f"{module}.weight"
        if set(found) != {"A", "B"} or name not in base.tensors:
            raise _unsupported(source, f"its factors for {module} fit no tensor of the base")
        a, b = found["A"], found["B"]
        rank, (rows, cols) = a.shape[0], base.tensors[name].shape
        if (b.shape, a.shape) != ((rows, rank), (rank, cols)):
            raise _unsupported(
                source, f"for {name} {(rows, cols)} it has B {b.shape} and A {a.shape}"
            )
        adapters[name] = StoredAdapter(a.name, b.name, _scale(config, module, rank))
    if not adapters:
        raise _unsupported(source, "it holds no factors")
    return adapters


def _scale(config: Mapping[str, Any], module: str, rank: int) -> float:
    alpha = float(config.get("lora_alpha", rank))
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        if re.fullmatch(rf"(?:.*\.)?{pattern}", module):
            alpha = float(value)
    return alpha / (sqrt(rank) if config.get("use_rslora") else rank)


def _absolute(path: Path, header: ShardHeader) -> ShardHeader:
    """A header whose shard is named from the root, since two directories are joined."""
    return _renamed(os.path.realpath(path).lstrip("/"), header)


def _renamed(shard: str, header: ShardHeader) -> ShardHeader:
    tensors = {name: replace(info, shard=shard) for name, info in header.tensors.items()}
    return ShardHeader(shard, header.file_bytes, tensors, header.metadata)


def _read_config(source: Source) -> dict[str, Any]:
    assert source.path is not None
    try:
        config = json.loads((source.path / ADAPTER_CONFIG).read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{source.given}: {ADAPTER_CONFIG} cannot be read ({error}).",
            remedy="Save the adapter again.",
        ) from error
    if not isinstance(config, dict):
        raise CheckpointError(
            f"{source.given}: {ADAPTER_CONFIG} is not a JSON object.",
            remedy="Save the adapter again.",
        )
    return config


def _unsupported(source: Source, why: str) -> CheckpointError:
    return CheckpointError(
        f"the adapter {source.given} cannot be used as it is: {why}.",
        remedy="Merge it into its base first: PeftModel.merge_and_unload(), save_pretrained().",
    )
