"""Counts on genuine and transformers-written name lists, as numbers."""

import pytest

from drift_merge.errors import AlignmentError
from drift_merge.names.align import align, require_complete
from drift_merge.names.tensors import Model
from drift_merge.names.towers import canonical_names
from tests.names import families as f

# on disk: tensors, in the tower, attn + mlp, prefix; in memory: tensors, in the tower, prefix
COUNTS = {
    "internlm2_7b_text": (227, 227, 160, "model.", None),
    "llava_style_logics_thinking_8b": (1205, 399, 252, "model.", None),
    "mistral_7b_text": (291, 291, 224, "model.", None),
    "qwen2_5_vl_3b": (824, 434, 360, "model.", None),
    "qwen2_vl_7b": (730, 339, 280, "model.", None),
    "qwen3_vl_cosmos_reason2": (750, 399, 252, "model.language_model.", None),
    "tiny_gemma3": (78, 28, 14, "language_model.model.", (79, 29, "model.language_model.")),
    "tiny_idefics3": (59, 21, 14, "model.text_model.", (59, 21, "model.text_model.")),
    "tiny_internvl": (66, 26, 20, "language_model.model.", (67, 27, "model.language_model.")),
    "tiny_llava": (64, 21, 14, "language_model.model.", (64, 21, "model.language_model.")),
    "tiny_llava_next": (65, 21, 14, "language_model.model.", (65, 21, "model.language_model.")),
    "tiny_qwen2_5_vl": (57, 27, 20, "model.", (57, 27, "model.language_model.")),
    "tiny_qwen2_vl": (58, 27, 20, "model.", (58, 27, "model.language_model.")),
    "tiny_qwen3_vl": (64, 25, 14, "model.language_model.", (64, 25, "model.language_model.")),
    "tiny_smolvlm": (59, 21, 14, "model.text_model.", (59, 21, "model.text_model.")),
}
LISTS = [(name, False) for name in COUNTS] + [(n, True) for n, c in COUNTS.items() if c[4]]


def expected(name, in_memory):
    total, tower, default, prefix, memory = COUNTS[name]
    return (
        (memory[0], memory[1], default, memory[2]) if in_memory else (total, tower, default, prefix)
    )


def text_twin(model):
    """The text LLM with exactly the tower's tensors, in the names of a plain decoder."""
    tower = canonical_names(model)
    shapes = {}
    for stored, canonical in tower.canonical.items():
        new = canonical if canonical.startswith("lm_head") else f"model.{canonical}"
        shapes[new] = model.shapes[stored]
    return Model("text", shapes, {})


@pytest.mark.parametrize(("name", "in_memory"), LISTS)
def test_every_tower_tensor_matches_the_text_llm_it_was_made_from(name, in_memory):
    model = f.golden(name, in_memory=in_memory)
    total, tower, default, prefix = expected(name, in_memory)
    twin = text_twin(model)
    assert (len(model.shapes), len(twin.shapes)) == (total, tower)

    result = align(twin, model)
    require_complete(result)
    counts = {"matched": default, "not_selected": tower - default, "outside_tower": total - tower}
    assert f.statuses(result) == {k: v for k, v in counts.items() if v}
    assert result.mllm.tower == prefix

    vocabulary = {f"t{i}": i for i in range(128)}
    whole = align(twin, model, modules="full", vocabularies=(vocabulary, vocabulary))
    require_complete(whole)
    assert (whole.num_selected, whole.num_matched) == (tower, tower)


@pytest.mark.parametrize(("name", "in_memory"), LISTS)
def test_a_list_aligned_with_itself_matches_its_whole_tower(name, in_memory):
    model = f.golden(name, in_memory=in_memory)
    total, tower, _, _ = expected(name, in_memory)
    result = align(model, model, modules="full")
    counts = {"matched": tower, "outside_tower": 2 * (total - tower)}
    assert f.statuses(result) == {k: v for k, v in counts.items() if v}


@pytest.mark.parametrize("name", [n for n, c in COUNTS.items() if c[4]])
def test_disk_and_memory_names_have_the_same_canonical_names(name):
    disk, memory = (canonical_names(f.golden(name, in_memory=m)) for m in (False, True))
    extra = set(memory.canonical.values()) - set(disk.canonical.values())
    assert extra <= {"lm_head.weight"}  # a tied head is listed in memory, not stored
    assert set(disk.canonical.values()) <= set(memory.canonical.values())


def test_deepseek_distill_matches_qwen2_vl_and_is_warned_about_rope_theta():
    result = align(f.deepseek(), f.golden("qwen2_vl_7b"))
    assert f.statuses(result) == {"matched": 280, "not_selected": 59, "outside_tower": 391}
    assert (result.num_selected, result.num_matched, len(result.pairs)) == (280, 280, 280)
    finding = next(x for x in result.findings if x.code == "rope_theta")
    assert finding.severity == "warning"
    assert "10,000" in finding.message
    assert "1,000,000" in finding.message
    assert "rotary" in finding.message
    assert {x.code for x in result.findings} == {"rope_theta", "mrope"}


@pytest.mark.parametrize("name", ["qwen2_5_vl_3b", "qwen3_vl_cosmos_reason2"])
def test_another_fine_tuning_of_the_same_mllm_is_a_reasoner_without_a_note(name):
    model = f.golden(name)
    new = {
        n.replace("visual.", "model.visual.", 1)
        if n.startswith("visual.")
        else n.replace("model.", "model.language_model.", 1): shape
        for n, shape in model.shapes.items()
    }
    nested = {"rope_parameters": model.config.get("rope_scaling"), **model.config}
    moved = Model("newer", new, nested) if name == "qwen2_5_vl_3b" else model
    total, tower, default, *_ = COUNTS[name]
    for ours, theirs in ((model, model), (moved, model), (model, moved)):
        result = align(ours, theirs)
        require_complete(result)
        assert f.statuses(result) == {
            "matched": default,
            "not_selected": tower - default,
            "outside_tower": 2 * (total - tower),
        }
        assert result.findings == ()


def test_a_vision_tower_that_the_mllms_config_does_not_speak_of_is_still_one():
    mllm = f.golden("qwen2_5_vl_3b")
    silent = {key: value for key, value in mllm.config.items() if key != "vision_config"}
    assert align(mllm, Model("mllm", mllm.shapes, silent)).findings == ()


def test_deepseek_distill_against_another_size_is_refused_in_the_house_form():
    result = align(f.deepseek(), f.golden("qwen2_5_vl_3b"))
    with pytest.raises(AlignmentError) as caught:
        require_complete(result)
    text = caught.value.message
    assert text.startswith("80 of 360 parameters have no partner of the same shape.")
    assert "77 more; see them with: drift-prior align deepseek-ai/DeepSeek-R1" in text
    assert "hidden size 3584 and 2048" in text
    assert "--on-mismatch skip" in caught.value.remedy
    # With skip the list of names alone, without shapes, still pairs attention of other heads.
    with pytest.raises(AlignmentError, match="has other heads"):
        require_complete(result, on_mismatch="skip")
