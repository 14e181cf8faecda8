"""What two configs say, field by field."""

import pytest

from drift_merge.names.lineage import is_tied, lineage, text_config

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
