"""A manifest as a recipe: what it pins, what it asks for, and what it warns of."""

import json
from pathlib import Path

import pytest

from drift_merge.errors import CheckpointError, RecipeError, SourceError
from drift_merge.plans.prepare import changed_sources, prepare
from drift_merge.recipes.files import read_recipe
from drift_merge.storage.manifests import reseal
from tests import checkpoints as c
from tests.runs import run_linear, run_prior


@pytest.fixture
def made(tmp_path, monkeypatch):
    """A merge and a prior of relative sources, made in the current directory."""
    monkeypatch.chdir(tmp_path)
    c.make_pair(Path("models"))
    models = Path("models")
    run_linear(models / "reasoner", models / "mllm", Path("merge"), 0.25, layers="0:1")
    run_prior(models / "reasoner", models / "mllm", Path("prior"), modules="mlp")
    return tmp_path


@pytest.mark.parametrize("name", ["merge", "merge/drift_merge.json", "prior", "prior/prior.json"])
def test_a_manifest_gives_its_recipe_back(made, name):
    recipe = read_recipe(Path(name)).recipe()
    assert (recipe.reasoners, recipe.mllm) == (("models/reasoner",), "models/mllm")
    manifest = json.loads(next(Path(name.split("/")[0]).glob("*[er].json")).read_bytes())
    assert recipe.parameters() == manifest["parameters"]


def test_a_source_of_the_hub_is_pinned_to_the_commit_that_was_used(made):
    file = Path("merge/drift_merge.json")
    manifest = json.loads(file.read_bytes())
    pinned = {"source": "org/name@main", "repo_id": "org/name", "revision": "a" * 40}
    manifest["sources"]["mllm"] |= pinned
    file.write_text(json.dumps(reseal(manifest)))
    assert read_recipe(file).recipe().mllm == f"org/name@{'a' * 40}"


@pytest.mark.parametrize(("role", "flag"), [("reasoner", "--reasoner"), ("mllm", "--mllm")])
def test_a_local_source_that_is_gone_is_named_and_may_be_replaced(made, role, flag):
    Path("models", role).rename("moved")
    request = read_recipe(Path("merge"))
    with pytest.raises(SourceError, match=f"models/{role}, which is not there") as raised:
        request.recipe()
    assert f"{flag} PATH" in raised.value.remedy
    moved = request.recipe({role: "moved"})
    assert "moved" in (*moved.reasoners, moved.mllm)


def test_a_map_is_asked_for_since_the_manifest_has_only_its_name(made):
    file = Path("merge/drift_merge.json")
    manifest = json.loads(file.read_bytes())
    manifest["parameters"]["map_file"] = "names.yaml"
    file.write_text(json.dumps(reseal(manifest)))
    with pytest.raises(RecipeError, match=r"made with the map names\.yaml") as raised:
        read_recipe(file).recipe()
    assert "--map names.yaml" in raised.value.remedy
    assert read_recipe(file).recipe({"map": "other.yaml"}).map_file == Path("other.yaml")


def test_a_source_with_other_shapes_is_told_by_name(made):
    request = read_recipe(Path("merge"))
    prepared = prepare(request.recipe())
    assert changed_sources(request.remade.layouts, prepared, "drift_merge.json") == []
    tensors = c.read_tensors(Path("models/mllm")) | {"visual.more": c.store([1.0])}
    c.write_shard(Path("models/mllm/model.safetensors"), tensors)
    (warning,) = changed_sources(request.remade.layouts, prepare(request.recipe()), "M.json")
    assert "the mllm mllm is not what M.json was made with" in warning


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "something"}, "of the kind 'something'"),
        ({"format_version": 99}, "format version 99"),
        ({"sources": {}}, "does not say how it was made"),
        ({"parameters": {"unheard": 1}}, "does not say how it was made"),
    ],
)
def test_a_manifest_that_is_none_of_ours_is_refused(made, change, message):
    file = Path("merge/drift_merge.json")
    file.write_text(json.dumps(reseal(json.loads(file.read_bytes()) | change)))
    with pytest.raises(CheckpointError, match=message):
        read_recipe(file)
