"""Towers whose embedding, norm or head is called otherwise, or stands further up."""

import pytest

from drift_merge.errors import AlignmentError
from drift_merge.names.align import align, require_complete
from drift_merge.names.name_map import parse_name_map
from drift_merge.names.tensors import Model
from drift_merge.names.towers import canonical_names
from tests.names import families as f

LAYER = f.layer(bias=False)


def tower(layers, embedding, norm, head=None, number=2):
    shapes = {f"{embedding}.weight": (20, 8), f"{norm}.weight": (8,)}
    shapes |= {f"{layers}.{n}.{t}": s for n in range(number) for t, s in LAYER.items()}
    return shapes | ({f"{head}.weight": (20, 8)} if head else {})


STRANGE = {
    "nemotron": ("backbone.layers", "backbone.embeddings", "backbone.norm_f", "lm_head"),
    "chatglm": (
        "transformer.encoder.layers",
        "transformer.embedding.word_embeddings",
        "transformer.encoder.final_layernorm",
        "transformer.output_layer",
    ),
    "qianfan": ("lm.model.encoder.layers", "lm.model.embed_tokens", "lm.model.norm", "lm.lm_head"),
    "git": ("git.encoder.layer", "git.embeddings.word_embeddings", "git.final_norm", "output"),
    "kyutai": ("model.layers", "model.embed_tokens.embed_tokens", "model.norm", "lm_head"),
    "inkling": ("model.llm.layers", "model.llm.embed", "model.llm.norm", "model.llm.unembed"),
    "kosmos": ("text.model.layers", "text.model.embed_tokens", "text.model.layer_norm", None),
}


@pytest.mark.parametrize("where", STRANGE.values(), ids=STRANGE.keys())
def test_the_tower_is_found_whatever_its_parts_are_called(where):
    shapes = {**tower(*where), **f.VISION}
    found = canonical_names(Model("odd", shapes))
    names = set(found.canonical.values())
    assert {"embed_tokens.weight", "norm.weight"} <= names
    assert ("lm_head.weight" in names) == (where[3] is not None)
    assert found.num_layers == 2
    assert set(found.outside) == set(f.VISION)


def test_a_vision_tower_has_no_table_of_tokens():
    shapes = {
        "vision_model.encoder.layers.0.self_attn.q_proj.weight": (6, 6),
        "vision_model.embeddings.patch_embedding.weight": (6, 12),
        "vision_model.embeddings.position_embedding.weight": (9, 6),
        "encoder.layer.0.attention.weight": (6, 6),
        "embeddings.position_embeddings.weight": (9, 6),
    }
    with pytest.raises(AlignmentError, match="no language tower"):
        canonical_names(Model("clip", shapes))


EXTRAS = {
    "embed_tokens_per_layer.weight": (20, 12),
    "per_layer_model_projection.weight": (12, 8),
    "altup_projections.0.weight": (8, 8),
    "embed_positions.weight": (9, 8),
}


def test_full_takes_what_both_towers_have_beside_their_layers():
    ours = {**f.decoder(), **{f"model.{n}": s for n, s in EXTRAS.items()}}
    prefix = "language_model.model."
    theirs = {**f.mllm().shapes, **{f"{prefix}{n}": s for n, s in EXTRAS.items()}}
    tokens = {f"t{i}": i for i in range(20)}
    found = align(
        Model("text", ours), Model("mllm", theirs), modules="full", vocabularies=(tokens, tokens)
    )
    require_complete(found)
    assert {f"{prefix}{n}" for n in EXTRAS} <= {pair.mllm for pair in found.pairs}
    assert not {pair.mllm for pair in found.pairs} & set(f.VISION)
    by_word = align(Model("text", ours), Model("mllm", theirs))
    said = next(x.message for x in by_word.findings if x.code == "left_out")
    assert "altup_projections (1)" in said
    assert "embed_positions (1)" in said


@pytest.mark.parametrize("side", ["reasoner", "mllm"])
def test_what_one_side_alone_has_beside_its_layers_is_outside_and_named(side):
    one = {**f.decoder(), "model.v_head.weight": (1, 8)}
    two = f.mllm().shapes
    if side == "mllm":
        one, two = f.decoder(), {**two, "language_model.model.v_head.weight": (1, 8)}
    found = align(Model("text", one), Model("mllm", two), modules="attn,mlp,norm,re:v_head|mlp")
    require_complete(found)
    said = next(x.message for x in found.findings if x.code == "one_sided")
    assert said.startswith(f"The {side} alone has 1 tensors")
    record = next(r for r in found.records if "v_head" in r.name)
    assert record.status == "outside_tower"


def mtp(prefix, number):
    tails = {**LAYER, "eh_proj.weight": (8, 16), "enorm.weight": (8,), "hnorm.weight": (8,)}
    return {f"{prefix}layers.{number}.{tail}": shape for tail, shape in tails.items()}


@pytest.mark.parametrize("config", [{}, {"num_hidden_layers": 3, "num_nextn_predict_layers": 1}])
def test_a_block_of_multi_token_prediction_is_no_layer(config):
    ours = Model("text", {**f.decoder(tails=LAYER), **mtp("model.", 3)}, config)
    found = align(ours, f.mllm(tails=LAYER))
    require_complete(found)
    assert (found.reasoner.num_layers, found.mllm.num_layers) == (3, 3)
    assert any(x.code == "mtp" and "layers 3" in x.message for x in found.findings)


def test_a_config_tells_a_block_without_names_of_its_own():
    config = {"text_config": {"num_hidden_layers": 2, "num_nextn_predict_layers": 1}}
    shapes = f.decoder("language_model.model.", None, layers=3, tails=LAYER)
    found = canonical_names(Model("mllm", shapes, config))
    assert (found.num_layers, found.mtp) == (2, (2,))


def seq2seq():
    decoder = f.decoder("model.decoder.", tails={**LAYER, "encoder_attn.q_proj.weight": (8, 8)})
    encoder = {k.replace("decoder", "encoder"): v for k, v in f.decoder("model.decoder.").items()}
    return {**encoder, **decoder, **f.VISION}


def test_an_encoder_decoder_is_refused_with_that_word():
    model = Model("bart", seq2seq(), {"is_encoder_decoder": True})
    with pytest.raises(AlignmentError, match="encoder-decoder") as caught:
        align(model, model)
    assert "reasoner:\n  tower: model.decoder.layers\nmllm:" in caught.value.remedy


def test_its_decoder_is_taken_when_it_is_said():
    model = Model("bart", seq2seq(), {"is_encoder_decoder": True})
    with pytest.raises(AlignmentError) as caught:
        align(model, model)
    said = caught.value.remedy.split("--map:\n")[1]
    found = align(model, model, name_map=parse_name_map(said))
    require_complete(found)
    assert found.mllm.tower == "model.decoder."


def test_neither_model_stores_a_head_is_said_only_where_it_is_true():
    ours, theirs = f.decoder(head=None), f.mllm(head=None).shapes

    def said(config):
        tokens = {f"t{i}": i for i in range(20)}
        found = align(
            Model("text", ours, config),
            Model("mllm", theirs, config),
            modules="full",
            vocabularies=(tokens, tokens),
        )
        return {x.code for x in found.findings} & {"tied_head", "no_head"}

    assert said({}) == {"tied_head"}
    assert said({"tie_word_embeddings": True}) == {"tied_head"}
    assert said({"tie_word_embeddings": False}) == {"no_head"}


def test_blocks_that_both_models_have_are_paired():
    ours = Model("text", {**f.decoder(tails=LAYER), **mtp("model.", 3)})
    theirs = {**f.mllm(tails=LAYER).shapes, **mtp("language_model.model.", 3)}
    found = align(ours, Model("mllm", theirs))
    require_complete(found)
    assert found.mllm.num_layers == 3
    assert any(pair.mllm.endswith("layers.3.mlp.up_proj.weight") for pair in found.pairs)
