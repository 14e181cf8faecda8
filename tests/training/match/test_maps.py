"""Maps of the user, and modules that one side alone has."""

import pytest
import torch
from torch import nn

import drift_merge
from drift_merge.errors import AlignmentError, RecipeError
from tests import checkpoints as c
from tests.training.match.towers import OTHER, TOWER, renamed
from tests.training.toys import holder, memory_tensors

# Modules that the mllm adds.


def test_a_module_that_only_the_mllm_has_is_named_counted_and_left_alone(toy):
    model = toy.model()
    for layer in model.model.language_model.layers:
        layer.mlp.vision = nn.Linear(4, 4)
    handle = drift_merge.attach(model, toy.prior)
    assert len(handle.coverage.inserted) == 4
    assert handle.coverage.inserted[0].startswith(f"{TOWER}layers.0.mlp.vision.")
    assert handle.coverage.selected == 20
    assert "4 of the mllm alone" in handle.coverage.text()


def test_a_part_of_a_module_that_the_prior_lacks_stays_an_error(toy):
    model = toy.model()
    model.model.language_model.layers[1].mlp.up_proj.bias = nn.Parameter(
        torch.zeros(c.INTERMEDIATE)
    )
    with pytest.raises(AlignmentError, match=r"layers\.1\.mlp\.up_proj\.bias \(in memory"):
        drift_merge.attach(model, toy.prior)


def test_a_module_that_the_prior_was_not_asked_for_is_an_error(toy):
    model = toy.model()
    with pytest.raises(AlignmentError, match="not in") as e:
        drift_merge.attach(model, toy.prior, modules="attn,mlp,embed")
    assert f"drift-prior compute {toy.pair.reasoner} {toy.pair.mllm} -o prior-2" in e.value.remedy
    assert e.value.remedy.endswith("--modules attn,mlp,embed")


def test_a_layer_of_which_the_prior_holds_nothing_of_a_kind_is_an_error(toy):
    model = toy.model()
    model.model.language_model.layers.append(nn.Module())
    model.model.language_model.layers[2].mlp = nn.Linear(4, 4)
    with pytest.raises(AlignmentError, match=r"layers\.2\.mlp\.weight"):
        drift_merge.attach(model, toy.prior)


# The user's map.


def write_map(tmp_path, text):
    (tmp_path / "map.yaml").write_text(text)
    return tmp_path / "map.yaml"


def test_a_map_may_name_tensors_in_memory(toy, tmp_path):
    changed = {n: t + 1 for n, t in memory_tensors(toy.pair.mllm).items()}  # values say nothing
    model = holder(renamed(changed, *OTHER))
    map_file = write_map(
        tmp_path,
        f"""mllm:
  "{TOWER}layers.{{layer}}.mlp.zeta.*": "layers.{{layer}}.mlp.up_proj.*"
  "{TOWER}layers.{{layer}}.mlp.omega.*": "layers.{{layer}}.mlp.gate_proj.*"
""",
    )
    with pytest.warns(UserWarning, match="does not have the weights"):
        handle = drift_merge.attach(model, toy.prior, map_file=map_file, strict=False)
    assert handle.coverage.units == 20


def test_a_map_of_names_on_the_disk_does_no_harm(toy, tmp_path):
    """The file that was given to --map is the one to give here."""
    map_file = write_map(
        tmp_path,
        """reasoner:
  tower: model
mllm:
  tower: model
  "model.layers.{layer}.mlp.up_proj.weight": "layers.{layer}.mlp.up_proj.weight"
  "visual.nothing.*": null
""",
    )
    assert drift_merge.attach(toy.model(), toy.prior, map_file=map_file).coverage.units == 20


def test_what_a_map_leaves_out_is_not_asked_for(toy, tmp_path):
    model = toy.model()
    model.model.language_model.layers[0].mlp.up_proj.bias = nn.Parameter(
        torch.zeros(c.INTERMEDIATE)
    )
    with pytest.raises(AlignmentError):
        drift_merge.attach(model, toy.prior)
    map_file = write_map(tmp_path, f'mllm:\n  "{TOWER}layers.{{layer}}.mlp.up_proj.bias": null\n')
    assert drift_merge.attach(model, toy.prior, map_file=map_file).coverage.units == 20


def test_a_map_of_which_nothing_applies_is_refused(toy, tmp_path):
    map_file = write_map(tmp_path, 'mllm:\n  "transformer.h.{layer}.up": "layers.{layer}.mlp.up"\n')
    with pytest.raises(RecipeError, match="none of the 1 patterns") as e:
        drift_merge.attach(toy.model(), toy.prior, map_file=map_file)
    assert TOWER in e.value.remedy
