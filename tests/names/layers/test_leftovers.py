"""One module under two names, and modules that the mllm put into its layers."""

import pytest

from drift_merge.errors import AlignmentError
from drift_merge.names.align import align, require_complete
from drift_merge.names.tensors import Model
from tests.names import families as f

COSMOS = {
    "self_attn.q_proj": "self_attn.to_q",
    "self_attn.k_proj": "self_attn.to_k",
    "self_attn.v_proj": "self_attn.to_v",
    "self_attn.o_proj": "self_attn.to_out",
    "self_attn.q_norm": "self_attn.norm_q",
    "self_attn.k_norm": "self_attn.norm_k",
}


def renamed(names, tails):
    return {
        f"{names.get(module, module)}.{leaf}": shape
        for tail, shape in tails.items()
        for module, _, leaf in [tail.rpartition(".")]
    }


def text(tails):
    return Model("text", f.decoder(tails=tails))


def finding(alignment, code):
    return next((found for found in alignment.findings if found.code == code), None)


def test_other_names_of_attention_are_paired_by_their_words():
    tails = f.layer(bias=True, qk_norm=True)
    found = align(text(tails), f.mllm(tails=renamed(COSMOS, tails)), modules="attn,mlp,norm")
    require_complete(found)
    pairs = {pair.mllm.split(".", 4)[-1]: pair.parts[0].name for pair in found.pairs}
    assert pairs["self_attn.to_k.weight"].endswith("self_attn.k_proj.weight")
    assert pairs["self_attn.to_v.bias"].endswith("self_attn.v_proj.bias")
    assert pairs["self_attn.norm_q.weight"].endswith("self_attn.q_norm.weight")
    message = finding(found, "renamed").message
    assert "self_attn.to_q.weight is self_attn.q_proj.weight" in message


def test_names_without_a_common_word_are_paired_where_shapes_leave_no_choice():
    tails = {k: v for k, v in f.layer(bias=False).items() if "gate" not in k}
    other = renamed({"mlp.up_proj": "mlp.fc1", "mlp.down_proj": "mlp.fc2"}, tails)
    found = align(text(tails), f.mllm(tails=other))
    require_complete(found)
    pairs = {p.mllm.split(".")[-2]: p.parts[0].name.split(".")[-2] for p in found.pairs}
    assert (pairs["fc1"], pairs["fc2"]) == ("up_proj", "down_proj")


def test_two_of_one_shape_without_a_common_word_are_not_guessed():
    tails = f.layer(bias=False)
    other = renamed({"mlp.up_proj": "mlp.left", "mlp.gate_proj": "mlp.right"}, tails)
    with pytest.raises(AlignmentError, match="12 of 27"):
        require_complete(align(text(tails), f.mllm(tails=other)))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("input_layernorm", "post_feedforward_layernorm"),  # OLMo 2 normalises what comes out
        ("post_attention_layernorm", "pre_feedforward_layernorm"),
        ("self_attn.k_proj", "self_attn.v_proj"),
    ],
)
def test_two_known_names_are_two_parameters_though_shape_and_place_agree(one, other):
    tails = f.layer(bias=False)
    mine = {tail: shape for tail, shape in tails.items() if other not in tail}
    its = renamed({one: other}, mine)
    with pytest.raises(AlignmentError):
        require_complete(align(text(mine), f.mllm(tails=its), modules="attn,mlp,norm"))


def test_a_weight_is_not_a_bias():
    size = f.layer(bias=False)["input_layernorm.weight"]
    mine = f.layer(bias=False) | {"self_attn.one.weight": size}
    its = f.layer(bias=False) | {"self_attn.other.bias": size}
    with pytest.raises(AlignmentError):
        require_complete(align(text(mine), f.mllm(tails=its), modules="attn,mlp,norm"))


@pytest.mark.parametrize("name", ["attention.wk", "self_attn.wqkv_x", "self_attn.w13"])
def test_rows_that_may_lie_in_another_order_are_never_paired_by_shape(name):
    tails = f.layer(bias=False)
    other = renamed({"self_attn.k_proj": name}, tails)
    found = align(text(tails), f.mllm(tails=other))
    assert found.num_matched == found.num_selected - 6


def test_what_matches_in_some_layers_alone_is_no_pair():
    tails = {k: v for k, v in f.layer(bias=False).items() if "gate" not in k}
    mllm = f.mllm(tails=renamed({"mlp.up_proj": "mlp.fc1"}, tails))
    odd = next(n for n in mllm.shapes if "layers.2.mlp.fc1" in n)
    shapes = {n: (5, 8) if n == odd else s for n, s in mllm.shapes.items()}
    found = align(text(tails), Model("mllm", shapes))
    assert not any("fc1" in pair.mllm for pair in found.pairs)


ADAPTER = {
    "adapter.query.weight": (8, 8),
    "adapter.ff.fc1.weight": (16, 8),
    "adapter.ff.norm.weight": (8,),
    "adapter.gate": (1,),
}


@pytest.mark.parametrize("modules", ["attn,mlp", "attn,mlp,norm", "attn,mlp,norm,re:adapter"])
def test_a_module_that_the_reasoner_lacks_as_a_whole_is_named_and_left_alone(modules):
    mllm = f.mllm(tails={**f.layer(), **ADAPTER})
    found = align(f.TEXT, mllm, modules=modules.removesuffix(",re:adapter"))
    require_complete(found)
    assert "12 tensors" in finding(found, "inserted_modules").message
    assert "adapter (12)" in finding(found, "inserted_modules").message
    left = [r for r in found.records if "adapter" in r.name]
    assert [r.status for r in left] == ["not_selected"] * 12


def test_a_module_of_which_a_part_is_missing_stays_an_error():
    with pytest.raises(AlignmentError, match="9 of"):
        require_complete(align(text(f.layer(bias=False)), f.mllm(tails=f.layer(bias=True))))


def test_the_mlp_itself_is_no_insertion():
    tails = {k: v for k, v in f.layer().items() if "mlp" not in k}
    with pytest.raises(AlignmentError, match="9 of"):
        require_complete(align(text(tails), f.mllm()))


def test_norms_of_another_architecture_are_no_insertion():
    mllm = f.mllm(tails={**f.layer(), "pre_feedforward_layernorm.weight": (8,)})
    with pytest.raises(AlignmentError, match="3 of"):
        require_complete(align(f.TEXT, mllm, modules="attn,mlp,norm"))


def test_experts_of_another_shape_are_an_insertion_more_of_the_same_are_not():
    more = {
        f"mlp.experts.{e}.{part}_proj.weight": (8, 4) if part == "down" else (4, 8)
        for e in (3, 4)
        for part in ("gate", "up", "down")
    }
    found = align(text(f.experts()), f.mllm(tails={**f.experts(), **more}))
    require_complete(found)
    assert "18 tensors" in finding(found, "inserted_modules").message
    with pytest.raises(AlignmentError, match="21 of 60"):  # the router is of another shape too
        require_complete(align(text(f.experts()), f.mllm(tails=f.experts(5))))


def test_a_router_that_one_side_transposes_is_read_so():
    tails = f.experts()
    mllm = f.mllm(tails={**tails, "mlp.gate.weight": tails["mlp.gate.weight"][::-1]})
    found = align(text(tails), mllm)
    require_complete(found)
    part = next(p for p in found.pairs if p.mllm.endswith("mlp.gate.weight")).parts[0]
    assert (part.rows, part.cols, part.row_stride, part.col_stride) == (8, 3, 1, 8)


def test_a_bias_that_balances_experts_is_left_alone_where_it_does_not_match():
    bias = "mlp.gate.e_score_correction_bias"
    ours, theirs = ({**f.experts(), bias: (n,)} for n in (3, 6))
    found = align(text(ours), f.mllm(tails=theirs), has_router_biases=True)
    require_complete(found)
    assert not any(bias in pair.canonical for pair in found.pairs)
    same = align(text(ours), f.mllm(tails=ours), has_router_biases=True)
    assert sum(bias in pair.canonical for pair in same.pairs) == 3
