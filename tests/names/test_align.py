"""The account of an alignment: records, selection, heads, refusals."""

import time
from dataclasses import replace

import pytest

from drift_merge.errors import AlignmentError, RecipeError
from drift_merge.names.align import align, require_complete
from drift_merge.names.name_map import NameMap, SideMap, parse_name_map
from drift_merge.names.tensors import Model, Part
from tests.names import families as f

TEXT = f.TEXT
TOKENS = {f"t{i}": i for i in range(20)}


def status_of(alignment, name):
    return next(r.status for r in alignment.records if r.name == name)


def codes(alignment):
    return {finding.code for finding in alignment.findings}


def test_the_default_selects_attention_and_mlp_with_biases():
    result = align(TEXT, f.mllm())
    assert {p.module for p in result.pairs} == {"attn", "mlp"}
    assert sum(p.canonical.endswith(".bias") for p in result.pairs) == 9
    assert status_of(result, "norm.weight") == "not_selected"


def test_a_pair_of_equal_tensors_is_one_identity_part():
    pair = align(TEXT, f.mllm()).pairs[0]
    assert pair.canonical == "layers.0.mlp.down_proj.weight"
    assert pair.mllm == "language_model.model.layers.0.mlp.down_proj.weight"
    assert (pair.shape, pair.module, pair.layer) == ((8, 12), "mlp", 0)
    assert pair.parts == (Part("model.layers.0.mlp.down_proj.weight", 0, 0, 8, 12, 0, 12, 1),)


def test_pairs_come_in_the_order_in_which_a_model_runs():
    many = {"layers": 12}
    model, text = f.mllm(**many), Model("text", f.decoder(**many))
    result = align(text, model, modules="full", vocabularies=(TOKENS, TOKENS))
    assert [p.layer for p in result.pairs][1:-2] == sorted([*range(12)] * 12)
    assert result.pairs[0].module == "embed"
    assert [p.canonical for p in result.pairs][-2:] == ["norm.weight", "lm_head.weight"]


def test_embed_and_head_are_refused_without_vocabularies_even_with_equal_rows():
    for modules in ("embed", "head", "full", "re:embed"):
        with pytest.raises(AlignmentError, match="vocabularies") as caught:
            align(TEXT, f.mllm(), modules=modules)
        assert "pip install 'drift_merge[tokenizers]'" in caught.value.remedy


def test_embed_of_another_width_is_a_mismatch_whatever_the_vocabularies():
    result = align(TEXT, f.mllm(hidden=6), modules="embed")
    assert status_of(result, "embed_tokens.weight") == "shape_mismatch"


def test_equal_tokenizers_and_rows_need_no_row_map():
    result = align(TEXT, f.mllm(), modules="embed,head", vocabularies=(TOKENS, TOKENS))
    assert all(rows.is_identity for rows in result.rows.values())
    assert [p.parts[0].rows for p in result.pairs] == [20, 20]


def test_rows_of_another_vocabulary_are_matched_by_token():
    ours = {"a": 0, "b": 1, "c": 2, "<think>": 3}
    theirs = {"b": 0, "a": 1, "<image>": 2, "c": 3, "<box>": 4}
    text = Model("text", f.decoder(vocab=4))
    result = align(text, f.mllm(vocab=6), modules="embed,head", vocabularies=(ours, theirs))
    require_complete(result)
    rows = result.rows["embed_tokens.weight"]
    assert list(rows.rows) == [1, 0, -1, 2, -1, -1]
    assert (rows.num_matched, rows.num_unmatched, rows.is_identity) == (3, 3, False)
    assert result.pairs[0].shape == (6, 8)
    assert result.pairs[0].parts == (Part("model.embed_tokens.weight", 0, 0, 6, 8, 0, 8, 1),)
    assert codes(result) == {"tokens_differ", "rows_unmatched"}


def test_a_model_aligned_with_itself_needs_no_vocabularies():
    model = f.mllm()
    copy = Model(model.label, dict(model.shapes))
    for other in (model, copy):
        result = align(model, other, modules="full")
        assert result.num_selected == result.num_matched == 39
        assert result.rows == {}


def test_a_head_missing_on_both_sides_is_no_mismatch():
    text = Model("text", f.decoder(head=None))
    result = align(text, f.mllm(head=None), modules="attn,head")
    require_complete(result)
    assert "tied_head" in codes(result)


@pytest.mark.parametrize("reasoner_has_it", [True, False])
def test_a_head_on_one_side_is_selected_without_a_partner(reasoner_has_it):
    text = Model("text", f.decoder(head="lm_head." if reasoner_has_it else None))
    model = f.mllm(head=None if reasoner_has_it else "language_model.lm_head.")
    result = align(text, model, modules="attn,head")
    expected = "only_reasoner" if reasoner_has_it else "only_mllm"
    assert status_of(result, "lm_head.weight") == expected
    assert any(x.code == "tied_head" and x.severity == "warning" for x in result.findings)
    with pytest.raises(AlignmentError, match="1 of 22 parameters has no partner"):
        require_complete(result)


def test_a_head_that_the_config_calls_tied_is_a_second_name_where_no_data_was_compared():
    text = Model("text", f.decoder(head=None), {"tie_word_embeddings": True})
    model = f.mllm(config={"tie_word_embeddings": True, "vision_config": {"depth": 1}})
    result = align(text, model, modules="full", vocabularies=(TOKENS, TOKENS))
    require_complete(result)
    embedding = next(r for r in result.records if r.name == "embed_tokens.weight")
    assert embedding.second_names == ("language_model.lm_head.weight",)
    assert not any(r.name == "lm_head.weight" for r in result.records)
    (found,) = [x for x in result.findings if x.code == "second_names"]
    assert "no data was compared" in found.message


def test_a_head_that_differs_from_the_embedding_is_two_parameters_whatever_the_config_says():
    text = Model("text", f.decoder(), copies={})
    config = {"tie_word_embeddings": True, "vision_config": {"depth": 1}}
    model = replace(f.mllm(config=config), copies={})
    result = align(text, model, modules="full", vocabularies=(TOKENS, TOKENS))
    require_complete(result)
    assert status_of(result, "lm_head.weight") == "matched"
    assert "tied_apart" in codes(result)


def test_swapped_arguments_are_refused_with_the_right_order():
    model = f.mllm()
    with pytest.raises(AlignmentError, match="swapped arguments") as caught:
        align(Model("org/MLLM", model.shapes), Model("my text", TEXT.shapes))
    assert caught.value.remedy == "drift-prior align 'my text' org/MLLM"


def test_two_text_llms_are_allowed_with_a_warning():
    result = align(TEXT, Model("other", f.decoder()))
    require_complete(result)
    assert codes(result) == {"no_vision"}


def test_layers_limit_what_is_selected():
    result = align(TEXT, f.mllm(), modules="attn,norm", layers="1:")
    assert {p.layer for p in result.pairs} == {1, 2}
    assert status_of(result, "norm.weight") == "not_selected"
    assert result.num_selected == 2 * (7 + 2)


def test_embed_is_selected_beside_layers_because_it_is_named():
    pair = (TOKENS, TOKENS)
    result = align(TEXT, f.mllm(), modules="attn,embed", layers="0", vocabularies=pair)
    assert status_of(result, "embed_tokens.weight") == "matched"
    result = align(TEXT, f.mllm(), modules="full", layers="0", vocabularies=pair)
    assert status_of(result, "embed_tokens.weight") == "not_selected"


def test_another_depth_is_named_in_the_refusal_with_three_examples_and_a_count():
    result = align(Model("deep", f.decoder(layers=5)), f.mllm())
    with pytest.raises(AlignmentError) as caught:
        require_complete(result)
    lines = caught.value.message.splitlines()
    assert lines[0] == "20 of 50 parameters have no partner of the same shape."
    assert lines[1].split() == [
        "layers.3.mlp.down_proj.weight",
        *["reasoner", "(8,", "12)", "mllm", "none"],
    ]
    assert lines[4].strip() == "... 17 more; see them with: drift-prior align deep mllm --json"
    assert lines[5] == "These look like different model sizes: 5 and 3 layers (deep and mllm)."
    assert "--on-mismatch skip" in caught.value.remedy
    require_complete(result, on_mismatch="skip")


def test_zero_matches_are_an_error_even_with_skip():
    gpt = {
        "transformer.wte.weight": (20, 8),
        "transformer.ln_f.weight": (8,),
        **{f"transformer.h.{n}.attn.c_proj.weight": (8, 8) for n in range(3)},
    }
    result = align(Model("gpt2", gpt), f.mllm())
    with pytest.raises(AlignmentError, match="None of the selected") as caught:
        require_complete(result, on_mismatch="skip")
    assert "'transformer.'" in caught.value.message

    assert "{layer}" not in caught.value.remedy  # which of two of its shape it is, nothing tells
    text = 'reasoner:\n  "transformer.h.{layer}.attn.c_proj.weight":'
    text += ' "layers.{layer}.self_attn.o_proj.weight"'
    mapped = align(Model("gpt2", gpt), f.mllm(), name_map=parse_name_map(text))
    require_complete(mapped, on_mismatch="skip")
    assert mapped.num_matched == 3


def test_nothing_selected_is_an_error():
    with pytest.raises(AlignmentError, match="select no tensor"):
        require_complete(align(TEXT, f.mllm(), modules="re:nothing"), on_mismatch="skip")


def test_a_wrong_word_for_on_mismatch_is_refused():
    with pytest.raises(RecipeError, match="expected one of error, skip"):
        require_complete(align(TEXT, f.mllm()), on_mismatch="ignore")


def test_a_missing_bias_is_a_mismatch_not_a_zero():
    text = Model("text", f.decoder(tails=f.layer(bias=False)))
    result = align(text, f.mllm())
    assert f.statuses(result)["only_mllm"] == 9
    with pytest.raises(AlignmentError, match="9 of 30"):
        require_complete(result)


def test_unknown_shapes_match_by_name_and_have_no_parts():
    names = dict.fromkeys(f.mllm().shapes)
    result = align(TEXT, Model("names", names))
    assert result.num_matched == 30
    assert result.pairs[0].parts == ()


def test_every_norm_of_the_tower_is_a_norm():
    tails = f.layer(qk_norm=True) | {
        "pre_feedforward_layernorm.weight": (8,),
        "post_feedforward_layernorm.weight": (8,),
    }
    text = Model("text", f.decoder(tails=tails))
    result = align(text, f.mllm(tails=tails), modules="norm")
    assert result.num_matched == 3 * 6 + 1


@pytest.mark.parametrize(
    ("layers", "limit_seconds"), [(20, 3), pytest.param(103, 12, marks=pytest.mark.slow)]
)
def test_a_hundred_thousand_tensors_a_side_take_seconds_not_minutes(layers, limit_seconds):
    """103 layers; a fifth of them shows as well that the time does not grow with the square."""
    tails = f.experts(320)
    text = Model("text", f.decoder(layers=layers, tails=tails))
    model = f.mllm(layers=layers, tails=tails)
    assert len(text.shapes) > 960 * layers
    start = time.process_time()
    result = align(text, model)
    seconds = time.process_time() - start
    assert result.num_matched == result.num_selected
    assert seconds < limit_seconds, seconds  # of 103 layers 3 on an idle machine


def test_canonical_names_without_an_embedding_align_with_a_live_model_by_an_empty_prefix():
    prior = {p.canonical: p.shape for p in align(TEXT, f.mllm()).pairs}
    live = f.mllm("model.language_model.", "lm_head.", tails=f.fuse_tails(f.layer()))
    name_map = NameMap(reasoner=SideMap(tower=""))
    result = align(Model("prior", prior), live, name_map=name_map)
    require_complete(result)
    assert len(result.pairs) == 3 * 5
