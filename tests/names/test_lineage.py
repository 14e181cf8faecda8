"""What two configs say, field by field."""

import pytest

from drift_merge.names.align import align
from drift_merge.names.lineage import is_tied, lineage, text_config
from drift_merge.names.tensors import Model

TEXT = {
    "model_type": "qwen2",
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 128,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "vocab_size": 100,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
VISION = {"vision_config": {"depth": 2}}


def codes(ours, theirs):
    return [finding.code for finding in lineage(ours, theirs)]


@pytest.mark.parametrize(
    "mllm",
    [
        {**TEXT, **VISION, "model_type": "qwen2_vl"},
        {"model_type": "llava", "text_config": TEXT, **VISION},
        {"model_type": "internvl_chat", "llm_config": TEXT, **VISION},
        {"model_type": "x", "language_config": TEXT, **VISION},
        {"model_type": "omni", "thinker_config": {"text_config": TEXT, **VISION}},
    ],
)
def test_text_settings_are_found_wherever_they_are_nested(mllm):
    assert text_config(mllm)["hidden_size"] == 64
    assert codes(TEXT, mllm) == []


@pytest.mark.parametrize(
    ("change", "code", "severity"),
    [
        ({"hidden_size": 32, "head_dim": 16}, "hidden_size", "error"),
        ({"num_hidden_layers": 5}, "num_layers", "error"),
        ({"num_attention_heads": 8, "head_dim": 16}, "num_heads", "error"),
        ({"num_key_value_heads": 4}, "num_kv_heads", "error"),
        ({"head_dim": 32}, "head_dim", "error"),
        ({"intermediate_size": 1}, "intermediate_size", "error"),
        ({"rms_norm_eps": 1e-5}, "norm_eps", "warning"),
        ({"hidden_act": "gelu"}, "activation", "warning"),
        ({"vocab_size": 101}, "vocab_size", "info"),
        ({"bos_token_id": 5}, "bos_token_id", "info"),
        ({"eos_token_id": [2, 3]}, "eos_token_id", "info"),
        ({"rope_theta": 1000000.0}, "rope_theta", "warning"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_scaling", "warning"),
        ({"rope_scaling": {"type": "mrope", "mrope_section": [1, 2]}}, "mrope", "info"),
        ({"tie_word_embeddings": True}, "tied_embeddings", "info"),
        ({"model_type": "llama"}, "model_family", "info"),
    ],
)
def test_a_difference_in_one_field_is_one_finding(change, code, severity):
    (finding,) = lineage(TEXT, {"text_config": {**TEXT, **change}, **VISION})
    assert (finding.code, finding.severity) == (code, severity)
    assert finding.message.endswith(".")
    assert finding.remedy


def test_both_values_are_in_the_sentence():
    (finding,) = lineage(TEXT, {**TEXT, **VISION, "rope_theta": 1e6})
    assert "10,000 in the reasoner and 1,000,000 in the mllm" in finding.message
    assert "different rotary frames" in finding.message


def test_rope_parameters_of_transformers_5_are_the_same_thing():
    new = {k: v for k, v in TEXT.items() if k != "rope_theta"}
    new["rope_parameters"] = {"rope_type": "default", "rope_theta": 10000.0}
    assert codes(TEXT, {**new, **VISION}) == []
    new["rope_parameters"] = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0}
    old = {**TEXT, "rope_scaling": {"rope_type": "llama3", "factor": 8.0}}
    assert codes(old, {**new, **VISION}) == []
    assert codes(TEXT, {**new, **VISION}) == ["rope_scaling"]


def test_rope_of_full_attention_is_compared_where_layers_differ():
    by_layer = {"full_attention": {"rope_theta": 1e6}, "sliding_attention": {"rope_theta": 1e4}}
    new = {**TEXT, "rope_parameters": by_layer}
    assert codes(TEXT, {**new, **VISION}) == ["rope_theta"]


def test_a_rope_theta_left_out_is_the_default_of_its_family():
    bare = {k: v for k, v in TEXT.items() if k != "rope_theta"}
    assert codes(bare, {**TEXT, **VISION, "rope_theta": 1e6}) == ["rope_theta"]
    assert codes({**bare, "model_type": "new"}, {**TEXT, **VISION, "model_type": "new"}) == []


def test_fields_that_one_config_leaves_out_are_not_compared():
    assert codes(TEXT, {"text_config": {"model_type": "qwen2", "vocab_size": 100}, **VISION}) == []
    assert codes({}, TEXT) == []
    assert codes(TEXT, {}) == []


def test_a_head_size_is_derived_only_where_the_family_does_so():
    wide = {**TEXT, "model_type": "qwen3", "head_dim": 128}
    bare = {k: v for k, v in wide.items() if k != "head_dim"}
    assert codes(wide, {**bare, **VISION}) == []
    assert codes(TEXT, {**TEXT, **VISION, "head_dim": 16}) == []


def test_inserted_cross_attention_layers_are_not_counted():
    mllama = {**TEXT, "num_hidden_layers": 6, "cross_attention_layers": [1, 4]}
    assert codes(TEXT, {"text_config": mllama, **VISION}) == []


def mrope(sections, **more):
    return {**TEXT, **VISION, "rope_scaling": {"mrope_section": sections, "type": "mrope"} | more}


def test_two_mllms_with_the_same_sections_are_told_nothing_about_them():
    new = {"mrope_section": [1, 2], "rope_type": "default", "rope_theta": 10000.0}
    assert codes(mrope([1, 2]), mrope([1, 2])) == []
    assert codes(mrope([1, 2]), {"text_config": {**TEXT, "rope_parameters": new}, **VISION}) == []


@pytest.mark.parametrize(
    "reasoner", [mrope([2, 1]), mrope([1, 2], mrope_interleaved=True)], ids=["sections", "order"]
)
def test_two_mllms_that_split_rotary_angles_otherwise_are_a_warning(reasoner):
    for ours, theirs in ((reasoner, mrope([1, 2])), (mrope([1, 2]), {**TEXT, **VISION})):
        (finding,) = lineage(ours, theirs)
        assert (finding.code, finding.severity) == ("mrope", "warning")
        assert "mrope_section [" in finding.message


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, None),
        ({"tie_word_embeddings": False}, False),
        ({"tie_word_embeddings": False, "text_config": {"tie_word_embeddings": True}}, True),
        ({"text_config": {"tie_word_embeddings": False}}, False),
    ],
)
def test_tied_flags_are_read_at_both_levels(config, expected):
    assert is_tied(config) is expected


def aligned(ours, theirs, *, width=8, modules="attn,mlp", layers=1):
    """Two towers whose mlp is as wide as said, with these configs; what is found."""

    def shapes(mlp):
        found = {"model.embed_tokens.weight": (6, 4), "model.norm.weight": (4,)}
        for i in range(layers):
            found[f"model.layers.{i}.self_attn.q_proj.weight"] = (4, 4)
            found[f"model.layers.{i}.mlp.up_proj.weight"] = (mlp if i == 0 else 8, 4)
        return found

    reasoner = Model("reasoner", shapes(8), {**TEXT, **ours})
    mllm = Model("mllm", {"visual.x.weight": (2, 2), **shapes(width)}, {**TEXT, **VISION, **theirs})
    return {f.code: f for f in align(reasoner, mllm, modules=modules).findings}


@pytest.mark.parametrize("code", ["intermediate_size", "hidden_size"])
def test_shapes_that_agree_make_a_note_of_what_configs_say_of_them(code):
    found = aligned({code: 63}, {code: 64, "head_dim": 16})[code]
    assert found.severity == "info"
    assert "agree all the same" in found.message
    assert "can match" not in found.message


def test_shapes_that_differ_leave_it_an_error_that_says_of_how_many():
    found = aligned({"intermediate_size": 63}, {}, width=9)["intermediate_size"]
    assert (found.severity, "no mlp tensor can match" in found.message) == ("error", True)
    found = aligned({"intermediate_size": 63}, {}, width=9, layers=3)["intermediate_size"]
    assert "1 of 3 selected mlp tensors have other shapes" in found.message
    assert found.severity == "error"


@pytest.mark.parametrize(
    ("modules", "change"),
    [
        ("attn", {"intermediate_size": 1}),
        ("attn", {"hidden_act": "gelu"}),
        ("mlp", {"num_attention_heads": 8, "head_dim": 16}),
        ("mlp", {"rope_theta": 1e6}),
    ],
)
def test_what_concerns_no_selected_tensor_is_a_note(modules, change):
    (found,) = aligned({}, change, modules=modules).values()
    assert found.severity == "info"
    assert found.message.endswith("tensor is selected.")


def test_another_theta_says_which_public_models_fit():
    ours, theirs = ({**TEXT, "model_type": "qwen3", "rope_theta": t} for t in (1e6, 5e6))
    (found,) = lineage(ours, {"text_config": theirs | {"model_type": "qwen3_vl_text"}, **VISION})
    assert "5 times slower in the mllm" in found.message
    assert "v_proj, o_proj and the mlp are not concerned" in found.message
    assert "rope_theta 5,000,000" in found.remedy
    assert "Qwen3-4B-Thinking-2507" in found.remedy
    (found,) = lineage({**TEXT, "rope_theta": 5e5}, {**TEXT, **VISION, "rope_theta": 3e5})
    assert "of this family" not in found.remedy


@pytest.mark.parametrize("kind", ["su", "longrope"])
def test_long_scalings_are_named_and_told_apart_without_all_their_numbers(kind):
    factors = [1.0 + i / 10 for i in range(96)]
    scaling = {"type": kind, "short_factor": factors, "long_factor": factors}
    other = {"rope_type": "longrope", "short_factor": factors, "long_factor": factors[::-1]}
    assert (
        codes({**TEXT, "rope_scaling": scaling}, {**TEXT, **VISION, "rope_scaling": scaling}) == []
    )
    (found,) = lineage({**TEXT, "rope_scaling": scaling}, {**TEXT, **VISION, "rope_scaling": other})
    assert "longrope" in found.message
    assert len(found.message) < 500
    ours, theirs = found.message.split(" in the reasoner and ")
    assert "long_factor [1.0, 1.1, 1.2, ...] (96 values, checksum " in ours
    assert ours.partition("long_factor")[2] != theirs.partition("long_factor")[2]
    assert (
        ours.partition("short_factor")[2] == theirs.partition("short_factor")[2].partition(" in")[0]
    )


def test_the_older_word_for_a_scaling_is_the_same_scaling():
    ours, theirs = ({**TEXT, "rope_scaling": {"type": t, "factor": 2}} for t in ("su", "longrope"))
    assert codes(ours, {**theirs, **VISION}) == []
