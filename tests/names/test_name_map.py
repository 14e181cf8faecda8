"""The YAML of --map: what it says, and what is said of a wrong one."""

import pytest

from drift_merge.errors import AlignmentError, RecipeError
from drift_merge.names.align import align, require_complete
from drift_merge.names.name_map import NameMap, parse_name_map, read_name_map
from drift_merge.names.tensors import Model
from tests.names import families as f


def odd_names():
    """The text decoder in names that no rule knows."""
    return {
        n.replace("model.layers.", "decoder.block_")
        .replace("model.", "decoder.")
        .replace("self_attn", "att"): s
        for n, s in f.decoder().items()
    }


def test_patterns_name_what_the_structural_rule_cannot_read():
    text = """
reasoner:
  "decoder.block_{layer}.att.*": "layers.{layer}.self_attn.*"
  "decoder.block_{layer}.*": "layers.{layer}.*"
"""
    result = align(Model("odd", odd_names()), f.mllm(), name_map=parse_name_map(text))
    require_complete(result)
    assert result.num_matched == 30


def test_a_pattern_adds_to_the_structural_rule_and_null_leaves_out():
    shapes = {n.replace("mlp.up_proj", "mlp.wide"): s for n, s in f.decoder().items()}
    text = """
reasoner:
  "model.layers.{layer}.mlp.wide.weight": "layers.{layer}.mlp.up_proj.weight"
  "*bias": null
"""
    result = align(Model("odd", shapes), f.mllm(), name_map=parse_name_map(text))
    assert f.statuses(result)["matched"] == 21
    assert f.statuses(result)["only_mllm"] == 9


def test_experts_and_stars_are_carried_over_in_order():
    rule = parse_name_map(
        'mllm:\n  "a.*.{layer}.x{expert}.*": "layers.{layer}.mlp.experts.{expert}.*.*"'
    ).mllm.rules[0]
    assert rule.rename("a.P.7.x12.weight") == "layers.7.mlp.experts.12.P.weight"


def test_a_pattern_must_match_a_whole_name():
    side = parse_name_map('mllm:\n  "h.{layer}.x": "layers.{layer}.x"').mllm
    assert side.find("h.3.x") is not None
    assert side.find("model.h.3.x") is None
    assert side.find("h.3.xx") is None


def test_an_empty_map_says_nothing():
    assert parse_name_map("") == NameMap()


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("reasonr:\n  tower: x", 1, "nearest is 'reasoner'"),
        ("mllm:\n  towr: x", 2, "nearest is 'tower'"),
        ("mllm:\n  tower: x\n  tower: y", 3, "stands there twice"),
        ("mllm: x", 1, "expected names with values"),
        ("- mllm", 1, "expected names with values"),
        ("mllm:\n  a.b: [c]", 2, "expected one name or null"),
        ("mllm:\n  a.b: up_proj.weight", 2, "not a canonical name"),
        ('mllm:\n  a.b: "layers.{layer}.x"', 2, "uses {layer}"),
        ('mllm:\n  "a.*": "layers.0.*.*"', 2, r"uses \*"),
        ('mllm:\n  "a.{row}": "layers.0.x"', 2, "{row}"),
        ('mllm:\n  "a.{layer}.{layer}": "layers.{layer}.x"', 2, "cannot be used"),
    ],
)
def test_a_wrong_map_is_refused_with_file_and_line(tmp_path, text, line, message):
    path = tmp_path / "map.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=message) as caught:
        read_name_map(path)
    assert f"{path}, line {line}" in caught.value.message


def test_what_is_not_yaml_or_no_file_is_refused(tmp_path):
    with pytest.raises(RecipeError, match="is not YAML"):
        parse_name_map("a: [")
    with pytest.raises(RecipeError, match="cannot be read"):
        read_name_map(tmp_path / "none.yaml")


def test_a_pattern_that_matches_nothing_is_refused():
    name_map = parse_name_map('mllm:\n  "tower.h.{layer}.x": "layers.{layer}.x"')
    with pytest.raises(RecipeError, match="matches no tensor of mllm"):
        align(f.TEXT, f.mllm(), name_map=name_map)


def test_a_tower_that_is_not_there_is_refused_with_the_lists_that_are():
    with pytest.raises(AlignmentError, match="no list of layers under 'llm'") as caught:
        align(f.TEXT, f.mllm(), name_map=parse_name_map("mllm:\n  tower: llm"))
    assert "language_model.model.layers" in caught.value.message


def test_two_stored_names_for_one_canonical_name_are_refused():
    name_map = parse_name_map('mllm:\n  "*norm.weight": norm.weight')
    with pytest.raises(AlignmentError, match="both have the canonical name"):
        align(f.TEXT, f.mllm(), name_map=name_map)
