"""Single names: wrappers, synonyms, buffers."""

import pytest

from drift_merge.names.layouts import is_adapter_weight, is_buffer, rename_tail, strip_wrappers


@pytest.mark.parametrize(
    ("wrapped", "bare"),
    [
        ("module.model.norm.weight", "model.norm.weight"),
        ("_orig_mod.module.model.norm.weight", "model.norm.weight"),
        ("base_model.model.model.norm.weight", "model.norm.weight"),
        ("module.base_model.model._orig_mod.model.norm.weight", "model.norm.weight"),
        ("base_model._orig_mod.model.model.norm.weight", "model.norm.weight"),
        ("model.layers.0._checkpoint_wrapped_module.mlp.x.weight", "model.layers.0.mlp.x.weight"),
        ("model.layers.0.mlp.x.base_layer.weight", "model.layers.0.mlp.x.weight"),
        ("lm_head.modules_to_save.my_adapter.weight", "lm_head.weight"),
        ("lm_head.original_module.weight", "lm_head.weight"),
        ("modules_to_save._fsdp_wrapped_module.default.weight", "weight"),
        ("model.module_list.0.weight", "model.module_list.0.weight"),
        ("model.submodule.0.weight", "model.submodule.0.weight"),
        ("", ""),
    ],
)
def test_wrappers_are_stripped_and_nothing_else(wrapped, bare):
    assert strip_wrappers(wrapped) == bare
    assert strip_wrappers(bare) == bare


def test_synonyms_of_the_llama_names_are_renamed_and_the_permuted_wq_is_not():
    assert rename_tail("attention.wqkv.bias") == "self_attn.wqkv.bias"
    assert rename_tail("feed_forward.w2.weight") == "mlp.down_proj.weight"
    assert rename_tail("block_sparse_moe.experts.7.w3.weight") == "mlp.experts.7.up_proj.weight"
    assert rename_tail("attention.wq.weight") == "attention.wq.weight"


def test_renaming_twice_changes_nothing():
    for tail in ("attention.wo.weight", "feed_forward.w1.weight", "attention_norm.weight"):
        assert rename_tail(rename_tail(tail)) == rename_tail(tail)


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("layers.0.self_attn.rotary_emb.inv_freq", (4,), True),
        ("rotary_emb.sliding_attention_inv_freq", (4,), True),
        ("layers.0.attn.masked_bias", (), True),
        ("layers.0.attn.bias", (1, 1, 4, 4), True),
        ("layers.0.attn.bias", None, True),
        ("layers.0.attn.bias", (4,), False),
        ("layers.0.self_attn.q_proj.bias", (4, 4), False),
        ("layers.0.cross_attn.bias", (4, 4), False),
    ],
)
def test_buffers_are_told_by_name_and_masks_by_shape(name, shape, expected):
    assert is_buffer(name, shape) is expected


def test_adapters_are_told_by_name():
    assert is_adapter_weight("layers.0.mlp.up_proj.lora_B.default.weight")
    assert not is_adapter_weight("layers.0.mlp.up_proj.weight")
