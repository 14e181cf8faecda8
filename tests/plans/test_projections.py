"""Which matrices a tensor holds, against what families store; every entry in exactly one."""

import pytest
import torch

from drift_merge.maths.spectra.matrices import groups, whole
from drift_merge.plans.projections import projections

CONFIG = {"text_config": {"num_attention_heads": 4, "num_key_value_heads": 2}}
MLP, ATTN = "layers.0.mlp.", "layers.0.self_attn."


def filled(shape, matrices):
    """The tensor as (rows, cols) with the number of the matrix that each entry is in, from 1."""
    count = torch.zeros(int(torch.tensor(shape[:-1]).prod()), shape[-1], dtype=torch.int64)
    for number, matrix in enumerate(matrices, start=1):
        left, right, step = matrix.cols
        for a, b in matrix.rows:
            part = count[a:b, left:right:step]
            assert not part.any(), "in two matrices"
            part.fill_(number)
    return count


def of(name, shape, module, config=CONFIG, **beside):
    found = projections(name, module, shape, config, dict(beside.items()))
    if found:
        assert filled(shape, found).all(), "an entry in none"
    return found


@pytest.mark.parametrize(
    ("name", "shape", "module"),
    [
        ("layers.0.input_layernorm.weight", (8,), "norm"),
        (ATTN + "q_proj.bias", (8,), "attn"),
        ("embed_tokens.weight", (40, 8), "embed"),
        ("lm_head.weight", (40, 8), "head"),
        ("layers.0.linear_attn.conv1d.weight", (8, 1, 4), "attn"),
        ("layers.0.conv.conv.weight", (8, 1, 4), "mixer"),
        (MLP + "gate_proj.weight", (0, 8), "mlp"),
    ],
)
def test_vectors_tables_and_convolutions_hold_none(name, shape, module):
    assert of(name, shape, module) == ()


@pytest.mark.parametrize("leaf", ["o_proj", "q_proj", "kv_b_proj", "in_proj"])
def test_a_projection_is_one_matrix(leaf):
    assert of(ATTN + leaf + ".weight", (8, 6), "attn") == whole((8, 6))


def test_a_stacked_qkv_holds_three_by_the_heads_of_the_config():
    found = of(ATTN + "qkv_proj.weight", (16, 8), "attn")  # 4 + 2 + 2 heads of 2 rows
    assert [matrix.rows for matrix in found] == [((0, 8),), ((8, 12),), ((12, 16),)]


def test_a_grouped_wqkv_is_taken_apart_and_read_as_one_group():
    found = of(ATTN + "wqkv.weight", (16, 8), "attn")
    assert [m.rows for m in found] == [((0, 4), (8, 12)), ((4, 6), (12, 14)), ((6, 8), (14, 16))]
    assert [len(group) for group in groups(found)] == [3]


def test_without_heads_that_fit_a_fused_qkv_is_one_matrix():
    assert of(ATTN + "qkv_proj.weight", (16, 8), "attn", {}) == whole((16, 8))
    assert of(ATTN + "qkv_proj.weight", (15, 8), "attn") == whole((15, 8))


@pytest.mark.parametrize("leaf", ["gate_up_proj", "up_gate_proj"])
def test_gate_and_up_are_two(leaf):
    found = of(MLP + leaf + ".weight", (12, 8), "mlp")
    assert [matrix.rows for matrix in found] == [((0, 6),), ((6, 12),)]


def test_experts_are_taken_one_by_one_however_they_are_stored():
    gate_up, down = MLP + "experts.gate_up_proj", MLP + "experts.down_proj"
    linear = {gate_up: (3, 8, 6), down: (3, 6, 4)}
    found = of(gate_up, linear[gate_up], "mlp", **linear)
    assert len(found) == 6
    assert found[3].rows == ((12, 16),)
    assert not found[0].is_transposed
    assert len(of(down, linear[down], "mlp", **linear)) == 3
    transposed = {gate_up: (3, 6, 8), down: (3, 4, 6)}
    found = of(gate_up, transposed[gate_up], "mlp", **transposed)
    assert [m.cols for m in found[:2]] == [(0, 4, 1), (4, 8, 1)]
    assert all(matrix.is_transposed for matrix in found)
    assert [len(group) for group in groups(found)] == [2, 2, 2]
    alternating = {"model_type": "gpt_oss"}
    found = of(gate_up, transposed[gate_up], "mlp", alternating, **transposed)
    assert [m.cols for m in found[:2]] == [(0, 8, 2), (1, 8, 2)]
    assert len(of(MLP + "experts.up_proj", (3, 4, 6), "mlp")) == 3
