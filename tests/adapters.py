"""LoRA adapters written by hand, and what they make of a weight in float64."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tests import checkpoints as c

RANK, ALPHA = 2, 6
IN_FILE = "base_model.model."


def modules_of(base: Path, chosen: Callable[[str], bool]) -> dict[str, tuple[int, ...]]:
    """Modules of a checkpoint with a matrix, by stored name, and its shape."""
    return {
        name.removesuffix(".weight"): tensor.shape
        for name, tensor in c.read_tensors(base).items()
        if name.endswith(".weight") and len(tensor.shape) == 2 and chosen(name)
    }


def write_adapter(
    path: Path,
    base: Path,
    modules: Mapping[str, tuple[int, ...]],
    *,
    ranks: Mapping[str, int] | None = None,
    changes: Mapping[str, c.Stored | None] | None = None,
    **config: Any,
) -> dict[str, tuple[np.ndarray, np.ndarray, np.ndarray | None]]:
    """Write a PEFT directory.

    Args:
        path: to make.
        base: what its config names.
        modules: names in memory and (outputs, inputs).
        ranks: of single modules; others have `RANK`.
        changes: tensors to add or replace by name in the file; None takes one away.
        config: fields beside `peft_type`, `r` and `lora_alpha`.

    Returns:
        A, B and DoRA's magnitudes by module, in float64.
    """
    generator = np.random.default_rng(7)
    tensors: dict[str, c.Stored] = {}
    factors = {}
    for module, (outputs, inputs) in modules.items():
        rank = (ranks or {}).get(module, RANK)
        a = c.store(generator.normal(size=(rank, inputs)), "F32")
        b = c.store(generator.normal(size=(outputs, rank)), "F32")
        tensors[f"{IN_FILE}{module}.lora_A.weight"] = a
        tensors[f"{IN_FILE}{module}.lora_B.weight"] = b
        magnitude = None
        if config.get("use_dora"):
            stored = c.store(generator.uniform(0.5, 2, size=outputs), "F32")
            tensors[f"{IN_FILE}{module}.lora_magnitude_vector"] = stored
            magnitude = stored.values.astype(np.float64)
        factors[module] = a.values.astype(np.float64), b.values.astype(np.float64), magnitude
    for name, tensor in (changes or {}).items():
        tensors.pop(name, None)
        if tensor is not None:
            tensors[name] = tensor
    path.mkdir()
    c.write_shard(path / "adapter_model.safetensors", tensors)
    fields = {"peft_type": "LORA", "lora_alpha": ALPHA, "r": RANK}
    fields |= {"base_model_name_or_path": str(base)} | config
    (path / "adapter_config.json").write_text(json.dumps(fields))
    return factors


def merged(
    weight: np.ndarray,
    factors: tuple[np.ndarray, np.ndarray, np.ndarray | None],
    scale: float = ALPHA / RANK,
) -> np.ndarray:
    """W + scale * B @ A, and under DoRA each row at its magnitude; (outputs, inputs), float64."""
    a, b, magnitude = factors
    result = weight.astype(np.float64) + scale * (b @ a)
    if magnitude is None:
        return result
    return magnitude[:, None] * result / np.sqrt((result**2).sum(axis=1, keepdims=True))


def bound(weight: np.ndarray, a: np.ndarray, b: np.ndarray, scale: float) -> float:
    """Of the error of `merged` in float32: a sum of rank + 1 products, and a row's norm."""
    largest = np.abs(weight).max() + abs(scale) * (np.abs(b) @ np.abs(a)).max()
    return float((len(a) + weight.shape[-1] + 4) * 2.0**-24 * largest)
