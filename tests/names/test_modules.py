"""Modules by word, layers by number."""

import pytest

from drift_merge.errors import RecipeError
from drift_merge.names.modules import classify, layer_of, parse_layers, parse_selection

CLASSES = {
    "layers.0.self_attn.q_proj.weight": "attn",
    "layers.0.self_attn.qkv_proj.bias": "attn",
    "layers.0.self_attn.wqkv.weight": "attn",
    "layers.0.self_attn.sinks": "attn",
    "layers.0.linear_attn.in_proj_qkv.weight": "attn",
    "layers.0.attn.c_attn.weight": "attn",
    "layers.10.mlp.gate_up_proj.weight": "mlp",
    "layers.0.mlp.gate.weight": "mlp",
    "layers.0.mlp.gate.e_score_correction_bias": "mlp",
    "layers.0.mlp.experts.gate_up_proj": "mlp",
    "layers.0.mlp.experts.11.down_proj.weight": "mlp",
    "layers.0.mlp.shared_experts.up_proj.weight": "mlp",
    "layers.0.mlp.shared_expert_gate.weight": "mlp",
    "layers.0.block_sparse_moe.gate.weight": "mlp",
    "layers.0.feed_forward.router.weight": "mlp",
    "layers.0.input_layernorm.weight": "norm",
    "layers.0.self_attn.q_norm.weight": "norm",
    "layers.0.self_attn.kv_a_layernorm.weight": "norm",
    "layers.0.pre_feedforward_layernorm.weight": "norm",
    "layers.0.ln_1.bias": "norm",
    "layers.0.self_attn.inner_attn_ln.weight": "norm",
    "layers.0.attention.output.LayerNorm.weight": "norm",
    "layers.0.mamba.in_proj.weight": "mixer",
    "layers.0.mixer.norm.weight": "norm",
    "layers.0.conv.conv.weight": "mixer",
    "layers.0.shared_mlp.input_linear.weight": "mlp",
    "layers.0.share_expert.up_proj.weight": "mlp",
    "layers.0.gate.weight": "mlp",
    "embed_tokens_per_layer.weight": "embed",
    "per_layer_projection_norm.weight": "norm",
    "norm.weight": "norm",
    "embed_tokens.weight": "embed",
    "lm_head.weight": "head",
    "layers.0.per_layer_projection.weight": "other",
    "rotary_emb.inv_freq": "other",
}


@pytest.mark.parametrize(("name", "module"), CLASSES.items())
def test_every_canonical_name_has_one_module(name, module):
    assert classify(name) == module


def test_layer_of_reads_the_number_after_layers_only():
    assert layer_of("layers.12.mlp.experts.3.up_proj.weight") == 12
    assert layer_of("embed_tokens.weight") is None


def test_full_takes_every_class():
    selection = parse_selection("full", None, 2, has_router_biases=True)
    assert all(selection.takes(name) for name in CLASSES)


@pytest.mark.parametrize("word", ["full", "mlp", "re:gate"])
def test_the_bias_that_balances_experts_is_taken_only_where_it_is_asked_for(word):
    bias = "layers.0.mlp.gate.e_score_correction_bias"
    assert not parse_selection(word, None, 2).takes(bias)
    assert parse_selection(word, None, 2, has_router_biases=True).takes(bias)


@pytest.mark.parametrize(
    ("text", "layers"),
    [
        ("0:3", {0, 1, 2}),
        ("4:", {4, 5}),
        (":", set(range(6))),
        (":-4", {0, 1}),
        ("-2:", {4, 5}),
        ("0, 3,4:9", {0, 3, 4, 5}),
        ("-1", {5}),
    ],
)
def test_layers_are_read_as_python_reads_slices(text, layers):
    assert parse_layers(text, 6) == layers


@pytest.mark.parametrize("text", ["", "a", "1-3", "0:2:2", "6", "-7", "3:3", "9:", "1,,2", "1.5"])
def test_layers_that_cannot_be_read_or_select_nothing_are_refused(text):
    with pytest.raises(RecipeError, match="layers:") as caught:
        parse_layers(text, 6)
    assert "--layers 0:28" in caught.value.remedy


@pytest.mark.parametrize(("typo", "near"), [("atn", "attn"), ("mpl", "mlp"), ("norms", "norm")])
def test_a_typo_names_the_nearest_module_and_all_choices(typo, near):
    with pytest.raises(RecipeError, match=f"Did you mean '{near}'") as caught:
        parse_selection(f"attn,{typo}", None, 2)
    assert "attn, mlp, mixer, norm, embed, head, full or re:REGEX" in caught.value.remedy


@pytest.mark.parametrize("text", ["", " , ", "re:(", "re:q_proj,mpl", "xyz"])
def test_modules_that_mean_nothing_are_refused(text):
    with pytest.raises(RecipeError, match="modules"):
        parse_selection(text, None, 2)


def test_a_list_is_refused_instead_of_read_character_by_character():
    with pytest.raises(RecipeError, match="expected text"):
        parse_selection(["attn"], None, 2)


def test_a_regular_expression_is_searched_and_may_hold_commas_in_brackets():
    selection = parse_selection(r"re:experts\.\d{1,2}\.up,norm", None, 2)
    assert selection.takes("layers.0.mlp.experts.11.up_proj.weight")
    assert not selection.takes("layers.0.mlp.experts.111.up_proj.weight")
    assert selection.takes("norm.weight")


def test_layers_leave_out_what_has_no_layer_unless_it_is_asked_for_by_name():
    by_word = parse_selection("full", "0", 2)
    assert not by_word.takes("norm.weight")
    assert not by_word.takes("embed_tokens.weight")
    by_name = parse_selection(r"attn,embed,re:^norm\.", "0", 2)
    assert by_name.takes("norm.weight")
    assert by_name.takes("embed_tokens.weight")
    assert not by_name.takes("layers.1.self_attn.q_proj.weight")
    assert not parse_selection("re:q_proj", "0", 2).takes("layers.1.self_attn.q_proj.weight")
