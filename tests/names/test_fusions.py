"""The parts of fused, split and transposed storage against naive constructions in numpy."""

import numpy as np
import pytest

from drift_merge.names import fusions
from drift_merge.names.align import align
from drift_merge.names.tensors import Model, Pair, identity_parts
from tests.names import families as f
from tests.names.naive import naive_experts, naive_fused, naive_internlm


def tensors(shapes):
    return {n: np.array(v).reshape(shapes[n]) for n, v in f.fill(shapes).items()}


def shapes_of(arrays):
    return {name: value.shape for name, value in arrays.items()}


def check(reasoner_arrays, mllm_arrays, *, config=None, records=None):
    """Both hold the same model: what the parts rebuild must equal what the mllm stores."""
    ours = Model("text", shapes_of(reasoner_arrays), config or {})
    theirs = Model("mllm", shapes_of(mllm_arrays) | {"visual.x": (1,)}, config or {})
    result = align(ours, theirs, modules="attn,mlp,norm")
    assert result.num_selected == result.num_matched > 0
    assert records is None or result.num_matched == records
    flat = {name: value.reshape(-1).tolist() for name, value in reasoner_arrays.items()}
    for pair in result.pairs:
        got = np.array(f.assemble(pair, flat)).reshape(pair.shape)
        np.testing.assert_array_equal(got, mllm_arrays[pair.mllm], err_msg=pair.canonical)
    used = {name for r in result.records if r.status == "matched" for name in r.mllm}
    assert used == {pair.mllm for pair in result.pairs}


@pytest.mark.parametrize("bias", [True, False])
def test_fused_qkv_and_gate_up_are_split_and_joined_exactly(bias):
    split = tensors(f.decoder(tails=f.layer(bias=bias)))
    fused = naive_fused(split)
    num = (7 if bias else 6) * 3 + 1  # qkv (and its bias), o, gate_up, down, two norms
    check(fused, split, records=num)
    check(split, fused, records=num)


@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize(("hidden", "width"), [(8, 5), (8, 4), (8, 8), (4, 8)])
def test_experts_are_joined_split_and_transposed_exactly(hidden, width, transposed):
    split = tensors(f.decoder(tails=f.experts(3, hidden=hidden, width=width), hidden=hidden))
    fused = naive_experts(split, transposed=transposed)
    check(split, fused)
    check(fused, split)


@pytest.mark.parametrize(("hidden", "width"), [(8, 5), (8, 4), (8, 8)])
def test_experts_fused_on_both_sides_are_transposed_where_the_layouts_differ(hidden, width):
    split = tensors(f.decoder(tails=f.experts(3, hidden=hidden, width=width), hidden=hidden))
    linear, transposed = (naive_experts(split, transposed=t) for t in (False, True))
    check(linear, transposed)
    check(transposed, linear)
    check(transposed, transposed)


def test_interleaved_wqkv_is_split_and_joined_exactly():
    split = tensors(f.decoder(tails=f.layer(bias=False)))
    interleaved = naive_internlm(split)
    config = {"num_key_value_heads": f.KV}
    check(interleaved, split, config=config)
    check(split, interleaved, config=config)


def test_interleaved_wqkv_without_the_number_of_kv_heads_is_refused_with_the_reason():
    result = align(Model("text", f.internlm()), f.mllm(tails=f.layer(bias=False)))
    assert f.statuses(result)["shape_mismatch"] == 3
    finding = next(x for x in result.findings if x.code == "fused_layout")
    assert finding.severity == "error"
    assert "num_key_value_heads" in finding.message


def test_square_experts_whose_layout_nothing_tells_are_refused():
    tails = f.experts(2, hidden=8, width=4)
    fused = f.fused_experts(2, hidden=8, width=4)
    del fused["mlp.experts.down_proj"]
    tails = {k: v for k, v in tails.items() if "down_proj" not in k or ".experts." not in k}
    tails |= {f"mlp.experts.{e}.down_proj.weight": (9, 9) for e in range(2)}
    result = align(Model("text", f.decoder(tails=tails)), f.mllm(tails=fused))
    assert f.statuses(result)["shape_mismatch"] == 3
    assert any("transposed" in x.message for x in result.findings if x.code == "fused_layout")


def test_a_fused_group_is_one_record_named_after_the_fused_tensor():
    fused = Model("text", f.decoder(tails=f.fuse_tails(f.layer())))
    result = align(fused, f.mllm())
    record = next(r for r in result.records if r.name == "layers.0.self_attn.qkv_proj.weight")
    assert record.reasoner == ("model.layers.0.self_attn.qkv_proj.weight",)
    assert [n.rsplit(".", 2)[1] for n in record.mllm] == ["q_proj", "k_proj", "v_proj"]
    assert record.shape == (16, 8)
    assert result.num_selected == result.num_matched == 3 * 5
    assert len(result.pairs) == 3 * 10
    assert [x.code for x in result.findings] == ["fused"]


def test_a_regular_expression_takes_one_matrix_out_of_a_fused_tensor():
    fused = Model("text", f.decoder(tails=f.fuse_tails(f.layer())))
    result = align(fused, f.mllm(), modules=r"re:self_attn\.k_proj\.weight")
    assert [p.canonical for p in result.pairs] == [
        f"layers.{n}.self_attn.k_proj.weight" for n in range(3)
    ]


def test_a_fused_tensor_with_other_row_counts_is_one_shape_mismatch():
    tails = f.fuse_tails(f.layer()) | {"self_attn.qkv_proj.weight": (17, 8)}
    result = align(Model("text", f.decoder(tails=tails)), f.mllm())
    bad = [r.name for r in result.records if r.status == "shape_mismatch"]
    assert bad == [f"layers.{n}.self_attn.qkv_proj.weight" for n in range(3)]


def test_mixtral_experts_match_fused_experts_of_the_llama_names():
    tails = {}
    for tail, shape in f.experts().items():
        for new, old in (("w1", "gate_proj"), ("w2", "down_proj"), ("w3", "up_proj")):
            tail = tail.replace(f"{old}.weight", f"{new}.weight") if ".experts." in tail else tail
        tails[tail.replace("mlp.", "block_sparse_moe.")] = shape
    result = align(Model("text", f.decoder(tails=tails)), f.mllm(tails=f.fused_experts()))
    assert result.num_selected == result.num_matched == 3 * (4 + 3)


def test_identity_parts_cover_scalars_and_empty_tensors():
    for shape in ((), (1,), (5,), (0, 5), (2, 3), (2, 3, 4)):
        pair = Pair("x", "x", shape, identity_parts("x", shape), "mlp", None)
        data = f.fill({"x": shape})
        assert [v for row in f.assemble(pair, data) for v in row] == data["x"]


def test_experts_whose_gate_and_up_are_two_tensors_are_split_and_joined_exactly():
    fused = {"experts.gate_up_proj": (3, 10, 8)}
    splits = {"experts.gate_proj": (3, 5, 8), "experts.up_proj": (3, 5, 8)}
    names = {f"layers.0.mlp.{n}" for n in fused}, {f"layers.0.mlp.{n}" for n in splits}
    (group,) = fusions.find_groups(*names)
    slots = fusions.slots_of(
        group,
        {f"layers.0.mlp.{n}": s for n, s in fused.items()},
        {f"layers.0.mlp.{n}": s for n, s in splits.items()},
        None,
    )
    rows = sorted((slot.fused_row, slot.split.split(".")[-1], slot.split_row) for slot in slots)
    assert rows == [
        (10 * e + 5 * half, name, 5 * e)
        for e in range(3)
        for half, name in enumerate(("gate_proj", "up_proj"))
    ]
