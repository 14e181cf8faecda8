"""Finding the language tower in families that no golden list has."""

import pytest

from drift_merge.errors import AlignmentError
from drift_merge.names.align import align, require_complete
from drift_merge.names.name_map import SideMap
from drift_merge.names.tensors import Model
from drift_merge.names.towers import canonical_names
from tests.names import families as f

UNSEEN = [
    ("llm.model.", "llm.lm_head."),
    ("language_model.model.", "language_model.lm_head."),
    ("model.text_model.", "lm_head."),
    ("model.language_model.", "model.lm_head."),
    ("model.language_model.model.", "lm_head."),
    ("thinker.model.", "thinker.lm_head."),
    ("model.", "lm_head."),
    ("", "lm_head."),
]


def records(alignment, status):
    return [r.name for r in alignment.records if r.status == status]


@pytest.mark.parametrize(("prefix", "head"), UNSEEN)
def test_the_tower_is_found_under_any_prefix(prefix, head):
    model = f.mllm(prefix, head)
    result = align(f.TEXT, model, modules="attn,mlp,norm")
    require_complete(result)
    assert f.statuses(result) == {"matched": 37, "not_selected": 2, "outside_tower": 5}
    assert result.mllm.tower == prefix
    assert (result.mllm.num_layers, result.mllm.hidden_size) == (3, 8)


def with_talker(prefix="thinker.model."):
    """A thinker with the text's shapes beside a smaller talker with an embedding of its own."""
    talker = f.decoder("talker.model.", None, layers=2, hidden=6)
    return {**f.decoder(prefix, "thinker.lm_head."), **talker, **f.VISION}


def test_a_thinker_is_preferred_to_a_talker_because_it_agrees_with_the_reasoner():
    result = align(f.TEXT, Model("omni", with_talker()))
    require_complete(result)
    assert result.mllm.tower == "thinker.model."
    assert result.num_matched == 30
    assert sum(n.startswith("talker.") for n in records(result, "outside_tower")) == 26


def test_a_talker_of_the_reasoners_shape_is_taken_if_it_agrees_better():
    talker = Model("talker-text", f.decoder(layers=2, hidden=6))
    assert align(talker, Model("omni", with_talker())).mllm.tower == "talker.model."


def test_alone_the_config_decides_between_two_towers_and_then_the_size():
    shapes = with_talker()
    assert canonical_names(Model("omni", shapes)).root == "thinker.model."
    config = {"thinker_config": {"text_config": {"num_hidden_layers": 2, "hidden_size": 6}}}
    assert canonical_names(Model("omni", shapes, config)).root == "talker.model."


def test_what_the_tower_should_look_like_decides_before_config_and_size():
    like = {"layers.0.mlp.up_proj.weight": (12, 6)}
    assert canonical_names(Model("omni", with_talker()), like=like).root == "talker.model."


def test_two_equal_towers_are_refused_and_a_map_resolves_it():
    shapes = {**f.decoder("a.model.", None), **f.decoder("b.model.", None), **f.VISION}
    model = Model("twins", shapes)
    with pytest.raises(AlignmentError) as caught:
        align(f.TEXT, model)
    assert "a.model.layers" in caught.value.message
    assert "b.model.layers" in caught.value.message
    assert "--map:\nmllm:\n  tower: a.model" in caught.value.remedy
    for text in ("b.model", "b.model.", "b.model.layers"):
        assert canonical_names(model, name_map=SideMap(tower=text)).root == "b.model."


def test_layers_without_a_token_embedding_are_no_tower_and_the_lists_are_named():
    shapes = {n: s for n, s in f.mllm().shapes.items() if "embed_tokens" not in n}
    with pytest.raises(AlignmentError) as caught:
        align(f.TEXT, Model("headless", shapes))
    assert "vision_tower.vision_model.encoder.layers" in caught.value.message
    assert "connector.perceiver.layers" in caught.value.message
    assert "--map:\nmllm:\n  tower: language_model.model.layers" in caught.value.remedy
    mapped = canonical_names(
        Model("headless", shapes), name_map=SideMap(tower="language_model.model.layers")
    )
    assert len(mapped.canonical) == 3 * 12 + 2


def test_a_model_without_any_list_shows_its_names_and_no_map_that_would_not_work():
    with pytest.raises(AlignmentError) as caught:
        align(Model("gguf", {"blk.0.attn_q.weight": (1, 2)}), f.mllm())
    assert "lists of layers found: none" in caught.value.message
    assert "blk.0.attn_q.weight" in caught.value.message
    assert "guide layouts" in caught.value.remedy
    assert "{layer}" not in caught.value.remedy


def test_an_empty_model_has_no_tower():
    with pytest.raises(AlignmentError, match="none at all"):
        align(Model("empty", {}), f.mllm())


def mllama(layers=5, crossing=(1, 3)):
    """Mllama: cross-attention layers between the text's own, and 4 more embedding rows."""
    shapes, prefix = {}, "language_model.model."
    cross = {k: s for k, s in f.layer(bias=False).items() if "self_attn" not in k}
    cross |= {f"cross_attn.{p}_proj.weight": (8, 8) for p in "qkvo"}
    cross |= {"cross_attn.q_norm.weight": (2,), "cross_attn_attn_gate": (1,)}
    for number in range(layers):
        tails = cross if number in crossing else f.layer()
        shapes |= {f"{prefix}layers.{number}.{tail}": shape for tail, shape in tails.items()}
    top = {f"{prefix}embed_tokens.weight": (24, 8), f"{prefix}norm.weight": (8,)}
    head = {"language_model.lm_head.weight": (20, 8)}
    vision = {f"vision_model.transformer.layers.{n}.mlp.fc1.weight": (6, 6) for n in range(2)}
    return Model("mllama", {**shapes, **top, **head, **vision})


def test_text_layer_i_is_the_ith_self_attention_layer_of_mllama():
    result = align(f.TEXT, mllama())
    require_complete(result)
    stored = {p.canonical: p.mllm for p in result.pairs}
    for text, number in enumerate((0, 2, 4)):
        name = f"language_model.model.layers.{number}.self_attn.q_proj.weight"
        assert stored[f"layers.{text}.self_attn.q_proj.weight"] == name
    assert f.statuses(result) == {"matched": 30, "not_selected": 9, "outside_tower": 24}
    assert result.mllm.num_layers == 3
    finding = next(x for x in result.findings if x.code == "inserted_layers")
    assert (finding.severity, "(1, 3)" in finding.message) == ("info", True)


def test_an_encoder_decoder_with_cross_attention_in_each_layer_keeps_its_numbers():
    tails = f.layer() | {"cross_attn.q_proj.weight": (8, 8)}
    tower = canonical_names(f.mllm(tails=tails))
    assert (tower.inserted, tower.num_layers) == ((), 3)
    assert "layers.2.cross_attn.q_proj.weight" in tower.canonical.values()


def test_extra_heads_and_siblings_of_the_layers_are_outside_the_tower():
    extra = {"v_head.summary.weight": (1, 8), "score.weight": (2, 8), "model.image_newline": (8,)}
    reasoner = Model("rm", {**f.decoder(), **extra})
    result = align(reasoner, f.mllm())
    assert [n for n in records(result, "outside_tower") if n in extra] == sorted(extra)
    assert result.num_matched == 30


def test_buffers_are_in_the_tower_but_never_selected():
    extra = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": (1,),
        "model.rotary_emb.inv_freq": (1,),
        "model.layers.0.self_attn.masked_bias": (),
    }
    result = align(Model("old", {**f.decoder(), **extra}), f.mllm(), modules="attn,mlp,re:.*freq")
    assert result.num_selected == result.num_matched == 30
    stored = {r.reasoner[0]: r.status for r in result.records if r.reasoner}
    assert {stored[name] for name in extra} == {"not_selected"}


def test_a_buffer_stored_by_both_sides_is_one_record():
    tails = f.layer() | {"attn.bias": (1, 1, 4, 4)}
    result = align(Model("text", f.decoder(tails=tails)), f.mllm(tails=tails))
    record = next(r for r in result.records if r.name == "layers.1.attn.bias")
    assert (len(record.reasoner), len(record.mllm), record.status) == (1, 1, "not_selected")


def test_one_dimensional_attention_bias_is_a_parameter():
    tower = canonical_names(f.mllm(tails=f.layer() | {"attn.bias": (8,)}))
    assert tower.buffers == frozenset()


@pytest.mark.parametrize(
    "wrap",
    [
        lambda n: f"module.{n}",
        lambda n: f"_orig_mod.module.{n}",
        lambda n: f"module._orig_mod.{n}",
        lambda n: f"_fsdp_wrapped_module.{n}".replace(
            "mlp.", "_fsdp_wrapped_module._checkpoint_wrapped_module.mlp."
        ),
        lambda n: "base_model.model." + n.replace("_proj.", "_proj.base_layer."),
        lambda n: f"module.base_model.model.{n}".replace(
            "embed_tokens.", "embed_tokens.modules_to_save.default."
        ),
    ],
)
def test_a_wrapped_model_has_the_canonical_names_of_the_bare_one(wrap):
    model = f.mllm("model.language_model.", "lm_head.")
    wrapped = Model("live", {wrap(n): s for n, s in model.shapes.items()})
    bare, other = canonical_names(model), canonical_names(wrapped)
    assert {wrap(n): c for n, c in bare.canonical.items()} == dict(other.canonical)
    assert bare.root == other.root


def test_peft_adapters_and_frozen_copies_are_outside_the_tower():
    shapes = dict(f.decoder("base_model.model.model.", None))
    embedding = "base_model.model.model.embed_tokens"
    shapes[f"{embedding}.original_module.weight"] = shapes.pop(f"{embedding}.weight")
    shapes[f"{embedding}.modules_to_save.default.weight"] = (20, 8)
    lora = "base_model.model.model.layers.0.mlp.up_proj.lora_A.default.weight"
    tower = canonical_names(Model("peft", {**shapes, lora: (2, 8)}))
    assert set(tower.outside) == {lora, f"{embedding}.original_module.weight"}
    assert tower.canonical[f"{embedding}.modules_to_save.default.weight"] == "embed_tokens.weight"


def test_two_stored_tensors_with_one_canonical_name_are_refused():
    shapes = {**f.decoder(), "module.model.norm.weight": (8,)}
    with pytest.raises(AlignmentError, match=r"both have the canonical name norm\.weight") as e:
        canonical_names(Model("odd", shapes), side="reasoner")
    assert "null" in e.value.remedy


def test_other_names_for_the_same_places_become_canonical():
    shapes = {
        "transformer.wte.weight": (20, 8),
        "transformer.ln_f.weight": (8,),
        "transformer.ln_f.bias": (8,),
        "transformer.h.0.attn.c_attn.weight": (8, 24),
        "transformer.wpe.weight": (9, 8),
        "embed_out.weight": (20, 8),
    }
    tower = canonical_names(Model("gpt", shapes))
    assert sorted(tower.canonical.values()) == [
        "embed_tokens.weight",
        "layers.0.attn.c_attn.weight",
        "lm_head.weight",
        "norm.bias",
        "norm.weight",
        "wpe.weight",
    ]
    assert tower.extras == {"wpe.weight"}
    assert tower.outside == ()
