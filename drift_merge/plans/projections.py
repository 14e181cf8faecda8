"""The matrices that a tensor of the language tower holds: one, or those that it fuses.

Spectral methods take each projection by itself, as their papers do: q, k and v of a fused qkv,
gate and up, every expert. What is fused by design (the in_proj of a state-space mixer, the latent
projections of MLA) is one matrix. Vectors, embeddings, heads and convolutions hold none.
"""

import re
from collections.abc import Mapping
from typing import Any

from drift_merge.maths.spectra.matrices import Matrix, whole
from drift_merge.names.fusions import expert_layout, is_fused_experts
from drift_merge.names.lineage import text_config
from drift_merge.names.tensors import Shape

_MODULES = ("attn", "mlp", "mixer")
_STACKED = re.compile(r"(qkv_proj|query_key_value|wqkv|gate_up_proj|up_gate_proj)\.weight$")
EXPERT_PARTS = ("gate_up_proj", "down_proj")  # whose shapes together tell how experts are stored
_EXPERTS = re.compile(r"\.experts\.(?:gate|up|down)_proj$")  # stacked, but not fused
_CONVOLUTION = re.compile(r"(?:^|\.)\w*conv(?:1d)?\.")
_ALTERNATING = ("gpt_oss",)  # gate and up are every other column of a fused expert


def projections(
    name: str,
    module: str,
    shape: Shape,
    config: Mapping[str, Any],
    shapes: Mapping[str, Shape | None],
) -> tuple[Matrix, ...]:
    """The matrices of a tensor, each row and column of it in exactly one; () where it has none.

    Args:
        name: canonical name.
        module: of the tensor.
        shape: of the tensor.
        config: config.json of the mllm.
        shapes: canonical name -> shape of the tensors beside it.
    """
    if module not in _MODULES or len(shape) < 2 or 0 in shape or _CONVOLUTION.search(name):
        return ()
    if len(shape) == 3:
        return _experts(name, shape, text_config(config), shapes)
    found = _STACKED.search(name)
    if len(shape) > 3:
        return ()
    if found is None:
        return whole(shape)
    if found[1] in ("gate_up_proj", "up_gate_proj"):
        return _stacked((shape[0] // 2,) * 2, shape) if shape[0] % 2 == 0 else whole(shape)
    return _attention(found[1], shape, text_config(config))


def is_attention_stack(name: str) -> bool:
    """Whether a tensor fuses q, k and v, which only the numbers of heads can tell apart."""
    found = _STACKED.search(name)
    return found is not None and "gate" not in found[1]


def _stacked(heights: tuple[int, ...], shape: Shape) -> tuple[Matrix, ...]:
    """Matrices of these heights, one below the other."""
    found, row = [], 0
    for rows in heights:
        found.append(Matrix(((row, row + rows),), (0, shape[-1], 1)))
        row += rows
    return tuple(found)


def _attention(kind: str, shape: Shape, config: Mapping[str, Any]) -> tuple[Matrix, ...]:
    """q, k and v: stacked, or interleaved by key-value group."""
    heads = config.get("num_attention_heads")
    groups = config.get("num_key_value_heads") or heads
    if not isinstance(heads, int) or not isinstance(groups, int):
        return whole(shape)
    size, left = divmod(shape[0], heads + 2 * groups)
    if left or not size or heads % groups:
        return whole(shape)
    if kind == "qkv_proj":
        return _stacked((heads * size, groups * size, groups * size), shape)
    per = heads // groups
    places = ((0, per), (per, per + 1), (per + 1, per + 2))
    step = (per + 2) * size
    return tuple(
        Matrix(
            tuple((g * step + a * size, g * step + b * size) for g in range(groups)),
            (0, shape[1], 1),
        )
        for a, b in places
    )


def _experts(
    name: str, shape: Shape, config: Mapping[str, Any], shapes: Mapping[str, Shape | None]
) -> tuple[Matrix, ...]:
    """Every expert's own matrix, or its gate and its up."""
    _count, rows, cols = shape
    if not is_fused_experts(name):
        one = [(0, rows)] if _EXPERTS.search(name) else []
        return _per_expert(shape, [(r, (0, cols, 1)) for r in one], transposed=False)
    layout = expert_layout(name, shapes)
    transposed = layout == "transposed"
    if name.endswith(".down_proj"):
        pieces = [((0, rows), (0, cols, 1))]
    elif not transposed and rows % 2 == 0:
        pieces = [((0, rows // 2), (0, cols, 1)), ((rows // 2, rows), (0, cols, 1))]
    elif transposed and config.get("model_type") in _ALTERNATING:
        pieces = [((0, rows), (0, cols, 2)), ((0, rows), (1, cols, 2))]
    elif transposed and cols % 2 == 0:
        pieces = [((0, rows), (0, cols // 2, 1)), ((0, rows), (cols // 2, cols, 1))]
    else:
        pieces = [((0, rows), (0, cols, 1))]
    return _per_expert(shape, pieces, transposed=transposed)


def _per_expert(
    shape: Shape, pieces: list[tuple[tuple[int, int], tuple[int, int, int]]], *, transposed: bool
) -> tuple[Matrix, ...]:
    return tuple(
        Matrix(((e * shape[1] + rows[0], e * shape[1] + rows[1]),), cols, transposed)
        for e in range(shape[0])
        for rows, cols in pieces
    )
