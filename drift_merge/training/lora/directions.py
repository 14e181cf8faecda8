"""The direction of every LoRA or DoRA factor for one delta, from the factors as they are now."""

from collections.abc import Iterator
from importlib import import_module
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from drift_merge.training.lora.layers import _DORA, Adapted, Adapter, _tensor
from drift_merge.training.lora.projection import (
    FactorBlock,
    Magnitude,
    ReadFactors,
    ReadRows,
    project,
)


def directions(
    adapted: Adapted,
    read_rows: ReadRows,
    first_row: int,
    num_rows: int,
    read_factors: ReadFactors | None = None,
) -> tuple[Tensor, ...]:
    """Return the direction D of every trained factor, whole, for one delta.

    Arithmetic is in float32, or float64 where the factors are. Where factors are sharded every
    rank must call this at the same point: it gathers them, and computes the same result.

    Args:
        adapted: the weight.
        read_rows: rows of delta as a matrix, counted from delta's own first row.
        first_row: of the weight as a matrix where delta begins; not 0 in a fused weight.
        num_rows: of delta.
        read_factors: the same rows by factors, where delta has some.

    Returns:
        For every factor of `adapted.factors` a tensor of its shape; 0 where delta has no part.
    """
    rows = range(first_row, first_row + num_rows)
    found: list[Tensor] = []
    for adapter in adapted.adapters:
        a, b = (_compute(_values(adapter, role)) for role in "ab")
        into = {"a": torch.zeros_like(a), "b": torch.zeros_like(b)}
        magnitude = None
        if adapter.variant.startswith(_DORA):
            values = _compute(_values(adapter, "m"))
            into["m"] = torch.zeros_like(values)
            magnitude = Magnitude(_base_weight(adapter.layer), values, into["m"])
        blocks = list(_blocks(adapted, (a, b), (into["a"], into["b"])))
        scale = adapter.scale
        project(read_rows, rows, blocks, scale, magnitude, read_factors=read_factors)
        found += (into[factor.role] for factor in adapter.factors)
    return tuple(found)


def matrix_rows(adapted: Adapted) -> int:
    """The number of rows of the weight seen as one matrix, experts below each other."""
    return prod(adapted.shape[:-1])


def _blocks(
    adapted: Adapted, factors: tuple[Tensor, Tensor], into: tuple[Tensor, Tensor]
) -> Iterator[FactorBlock]:
    """Views of the factors for each block of rows of the weight seen as one matrix."""
    experts = adapted.shape[0] if len(adapted.shape) == 3 else 1
    rank = factors[0].shape[0] // experts

    def part(a: Tensor, b: Tensor, expert: int) -> tuple[Tensor, Tensor]:
        # PEFT keeps the experts outermost in A and innermost in B.
        left, right = a[expert * rank : (expert + 1) * rank], b[:, expert::experts]
        return (right.T, left.T) if adapted.is_transposed else (left, right)

    for expert in range(experts):
        left, right = part(*factors, expert)
        yield FactorBlock(expert * right.shape[0], left, right, *part(*into, expert))


def _values(adapter: Adapter, role: str) -> Tensor:
    """The whole tensor of a factor, trained or not."""
    value = _tensor(adapter.layer, adapter.name, role)
    assert value is not None
    return _whole(value)


def _compute(values: Tensor) -> Tensor:
    # Not in bfloat16 even where the factors are: its products are 60 times slower on many CPUs.
    return values.to(torch.float64 if values.dtype == torch.float64 else torch.float32)


def _whole(value: Tensor) -> Tensor:
    """A tensor without its shards, by all ranks at the same point: FSDP2's and ZeRO-3's."""
    if hasattr(value, "ds_id"):
        with import_module("deepspeed.runtime.zero").GatheredParameters([value]):
            return value.detach().clone()
    gather = getattr(value.detach(), "full_tensor", None)  # DTensor
    whole: Tensor = value.detach() if gather is None else gather()
    return whole


def _base_weight(layer: Any) -> Tensor:
    """W0 as DoRA's forward pass sees it; a packed one is unpacked by PEFT."""
    base = layer.get_base_layer()
    if isinstance(base.weight, nn.Parameter) and base.weight.is_floating_point():
        return _whole(base.weight)
    unpack = import_module("peft.utils.integrations").dequantize_module_weight
    weight: Tensor = unpack(base).detach()
    return weight
