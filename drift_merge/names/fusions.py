"""Matrices that one model stores fused and the other split, as rectangles.

A group is one fused tensor and the tensors it holds. Its slots say where each rectangle of
a split tensor lies in the fused one; the same slots give the parts of both directions.

Shapes: H = hidden size, I = width of an expert, E = number of experts. A fused tensor is
seen as `matrix_shape` sees it, so experts (E, A, B) are E * A rows of B columns.
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from drift_merge.names.tensors import Part, Shape, matrix_shape

_STACKS = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "up_gate_proj": ("up_proj", "gate_proj"),  # Molmo, where a map says so
}
_STACKED = re.compile(r"(.*)\.(qkv_proj|gate_up_proj|up_gate_proj)\.(weight|bias)")
_HALVES = {"gate_up_proj": "up_gate_proj", "up_gate_proj": "gate_up_proj"}
_INTERLEAVED = re.compile(r"(.*)\.wqkv\.(weight|bias)")
_EXPERTS = re.compile(r"(.*\.experts)\.(gate_up_proj|down_proj)")

INTERLEAVED_HINT = "wqkv interleaves q, k and v by key-value group"
LAYOUT_HINT = "the shapes do not tell whether the experts are transposed"


@dataclass(frozen=True, slots=True)
class FusedGroup:
    """One fused tensor and the canonical names of the tensors it holds, in its order."""

    fused: str
    kind: str  # "stack" | "interleaved" | "experts" | "stacked_experts"
    splits: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class FusedSlot:
    """Rows of a split tensor (all their columns) and where they lie in the fused one."""

    split: str
    split_row: int
    rows: int
    cols: int
    fused_row: int
    fused_col: int
    is_transposed: bool = False  # rows of the split tensor are columns of the fused one


def find_groups(fused_side: Collection[str], split_side: Collection[str]) -> list[FusedGroup]:
    """Return the groups whose fused tensor is in one set and all its splits in the other."""
    experts = _count_experts(split_side)
    groups = (_group(name, experts, split_side) for name in sorted(fused_side))
    return [g for g in groups if g and g.splits and all(name in split_side for name in g.splits)]


def slots_of(
    group: FusedGroup,
    fused: Mapping[str, Shape | None],
    splits: Mapping[str, Shape | None],
    num_kv_heads: int | None,
) -> tuple[FusedSlot, ...] | str:
    """Return where the split tensors lie in the fused one, or why that cannot be said.

    Args:
        group: the group.
        fused: canonical name -> shape of the side that stores it fused (its siblings too).
        splits: the same of the other side.
        num_kv_heads: key-value heads of the model; needed for "interleaved" alone.

    Returns:
        Slots that cover the fused tensor exactly once; a short reason if a shape does not
        fit ("" when the shapes say it all); () if a shape is unknown.
    """
    whole = fused[group.fused]
    shapes = [splits[name] for name in group.splits]
    known = [shape for shape in shapes if shape is not None]
    if whole is None or len(known) < len(shapes):
        return ()
    if group.kind == "experts":
        return _expert_slots(group, whole, known, fused)
    if group.kind == "stacked_experts":
        return _stacked_expert_slots(group, whole, known)
    rows, cols = matrix_shape(whole)
    views = [matrix_shape(shape) for shape in known]
    if sum(view[0] for view in views) != rows or any(view[1] != cols for view in views):
        return ""
    if group.kind == "interleaved":
        return _interleaved_slots(group, views, num_kv_heads)
    slots, row = [], 0
    for name, view in zip(group.splits, views, strict=True):
        slots.append(FusedSlot(name, 0, *view, fused_row=row, fused_col=0))
        row += view[0]
    return tuple(slots)


def split_parts(
    slots: tuple[FusedSlot, ...], stored: str, fused_cols: int
) -> dict[str, tuple[Part, ...]]:
    """Return, for each split tensor, its parts read from the fused tensor `stored`."""
    parts: dict[str, list[Part]] = {}
    for slot in slots:
        row_stride, col_stride = (1, fused_cols) if slot.is_transposed else (fused_cols, 1)
        part = Part(
            name=stored,
            row=slot.split_row,
            col=0,
            rows=slot.rows,
            cols=slot.cols,
            offset=slot.fused_row * fused_cols + slot.fused_col,
            row_stride=row_stride,
            col_stride=col_stride,
        )
        parts.setdefault(slot.split, []).append(part)
    return {name: tuple(sorted(found, key=lambda p: p.row)) for name, found in parts.items()}


def fused_parts(slots: tuple[FusedSlot, ...], stored: Mapping[str, str]) -> tuple[Part, ...]:
    """Return the parts of the fused tensor read from split tensors; `stored` names them."""
    parts = []
    for slot in slots:
        rows, cols = (slot.cols, slot.rows) if slot.is_transposed else (slot.rows, slot.cols)
        part = Part(
            name=stored[slot.split],
            row=slot.fused_row,
            col=slot.fused_col,
            rows=rows,
            cols=cols,
            offset=slot.split_row * slot.cols,
            row_stride=1 if slot.is_transposed else slot.cols,
            col_stride=slot.cols if slot.is_transposed else 1,
        )
        parts.append(part)
    return tuple(sorted(parts, key=lambda p: (p.row, p.col)))


def other_order(name: str) -> str | None:
    """Return the name of a fused matrix whose halves lie in the other order; None if it has none.

    >>> other_order("layers.0.mlp.gate_up_proj.weight")
    'layers.0.mlp.up_gate_proj.weight'
    """
    found = _STACKED.fullmatch(name)
    if found is None or found[2] not in _HALVES:
        return None
    return f"{found[1]}.{_HALVES[found[2]]}.{found[3]}"


def exchanged_parts(stored: str, shape: Shape) -> tuple[Part, ...]:
    """Return the parts of a fused matrix read from `stored`, whose halves are the other way round.

    The number of rows is even.
    """
    rows, cols = matrix_shape(shape)
    half = rows // 2
    return tuple(
        Part(stored, row, 0, half, cols, (half - row) * cols, cols, 1) for row in (0, half)
    )


def transposed_parts(stored: str, shape: Shape) -> tuple[Part, ...]:
    """Return the parts of experts of `shape` (E, A, B) read from `stored` of shape (E, B, A)."""
    experts, rows, cols = shape
    return tuple(
        Part(stored, e * rows, 0, rows, cols, e * rows * cols, 1, rows) for e in range(experts)
    )


def expert_layout(name: str, shapes: Mapping[str, Shape | None]) -> str | None:
    """Say how fused experts are stored: "linear" (E, 2I, H) or "transposed" (E, H, 2I).

    gate_up_proj and down_proj together always tell: linear has (E, 2I, H) and (E, H, I),
    transposed (E, H, 2I) and (E, I, H). None if one of them is missing or unknown.

    >>> pair = {"experts.gate_up_proj": (8, 64, 64), "experts.down_proj": (8, 64, 32)}
    >>> expert_layout("experts.gate_up_proj", pair)
    'linear'
    """
    prefix = name.rpartition(".")[0]
    gate_up, down = (shapes.get(f"{prefix}.{part}") for part in ("gate_up_proj", "down_proj"))
    if gate_up is None or down is None or len(gate_up) != 3 or len(down) != 3:
        return None
    if gate_up[1] == 2 * down[2] and gate_up[2] == down[1]:
        return "linear"
    if gate_up[2] == 2 * down[1] and gate_up[1] == down[2]:
        return "transposed"
    return None


def is_fused_experts(name: str) -> bool:
    """Whether a canonical name is that of all experts' matrices in one tensor."""
    return name.endswith((".experts.gate_up_proj", ".experts.down_proj"))


def _group(name: str, experts: Mapping[str, int], split_side: Collection[str]) -> FusedGroup | None:
    if found := _STACKED.fullmatch(name):
        splits = tuple(f"{found[1]}.{part}.{found[3]}" for part in _STACKS[found[2]])
        return FusedGroup(name, "stack", splits)
    if found := _INTERLEAVED.fullmatch(name):
        splits = tuple(f"{found[1]}.{part}.{found[2]}" for part in _STACKS["qkv_proj"])
        return FusedGroup(name, "interleaved", splits)
    if found := _EXPERTS.fullmatch(name):
        parts = _STACKS.get(found[2], (found[2],))
        stacked = tuple(f"{found[1]}.{part}" for part in parts)
        if len(parts) > 1 and all(name in split_side for name in stacked):
            return FusedGroup(name, "stacked_experts", stacked)
        numbers = range(experts.get(found[1], 0))
        splits = tuple(f"{found[1]}.{e}.{part}.weight" for e in numbers for part in parts)
        return FusedGroup(name, "experts", splits)
    return None


def _count_experts(names: Collection[str]) -> dict[str, int]:
    """Return prefix ("layers.0.mlp.experts") -> number of experts stored one by one."""
    counts: dict[str, int] = {}
    for name in names:
        prefix, dot, tail = name.partition(".experts.")
        if dot and tail.endswith(".down_proj.weight"):
            counts[f"{prefix}.experts"] = counts.get(f"{prefix}.experts", 0) + 1
    return counts


def _interleaved_slots(
    group: FusedGroup, views: list[tuple[int, int]], num_kv_heads: int | None
) -> tuple[FusedSlot, ...] | str:
    """Rows of each key-value group: its query heads, then its key head, then its value head."""
    (q_rows, cols), (k_rows, _), (v_rows, _) = views
    if not num_kv_heads or k_rows != v_rows or q_rows % num_kv_heads or k_rows % num_kv_heads:
        return f"{INTERLEAVED_HINT}; the config must give num_key_value_heads"
    slots, fused_row = [], 0
    for kv_group in range(num_kv_heads):
        for name, total in zip(group.splits, (q_rows, k_rows, v_rows), strict=True):
            rows = total // num_kv_heads
            slots.append(FusedSlot(name, kv_group * rows, rows, cols, fused_row, 0))
            fused_row += rows
    return tuple(slots)


def _expert_slots(
    group: FusedGroup, whole: Shape, shapes: list[Shape], fused: Mapping[str, Shape | None]
) -> tuple[FusedSlot, ...] | str:
    per_expert = 2 if group.fused.endswith(".gate_up_proj") else 1
    rows, cols = shapes[0] if len(shapes[0]) == 2 else (0, 0)
    experts = len(shapes) // per_expert
    if len(whole) != 3 or any(shape != (rows, cols) for shape in shapes):
        return ""
    linear = whole == (experts, per_expert * rows, cols)
    transposed = whole == (experts, cols, per_expert * rows)
    if linear and transposed:
        layout = expert_layout(group.fused, fused)
        if layout is None:
            return LAYOUT_HINT
        transposed = layout == "transposed"
    elif not linear and not transposed:
        return ""
    slots = []
    for index, name in enumerate(group.splits):
        expert, half = divmod(index, per_expert)
        row = expert * whole[1] + (0 if transposed else half * rows)
        slots.append(
            FusedSlot(name, 0, rows, cols, row, half * rows if transposed else 0, transposed)
        )
    return tuple(slots)


def _stacked_expert_slots(
    group: FusedGroup, whole: Shape, shapes: list[Shape]
) -> tuple[FusedSlot, ...] | str:
    """Gate and up are two tensors of all experts, (E, I, H), and one, (E, 2I, H), when fused."""
    if len(whole) != 3 or any(len(s) != 3 or s != shapes[0] for s in shapes):
        return ""
    experts, rows, cols = shapes[0]
    if whole != (experts, len(shapes) * rows, cols):
        return ""
    return tuple(
        FusedSlot(name, e * rows, rows, cols, e * whole[1] + half * rows, 0)
        for e in range(experts)
        for half, name in enumerate(group.splits)
    )
