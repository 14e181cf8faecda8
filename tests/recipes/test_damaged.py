"""Files with one odd value each, as a soak has found them: refused cleanly, with what they are."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.adapters import modules_of, write_adapter
from tests.checkpoints import Pair, make_pair
from tests.faults.harness import run


@pytest.fixture
def pair(tmp_path: Path) -> Pair:
    return make_pair(tmp_path, layers=1)


def refused(code: int, *words: str) -> str:
    result = run(*words)
    assert result.code == code, result
    assert "Traceback" not in result.stderr
    assert "this is a bug" not in result.stderr
    return result.stderr


@pytest.mark.parametrize("source", ['"\\0"', "x" * 300, "~nobody/x"])
def test_a_recipe_that_names_no_possible_path_is_refused(
    source: str, pair: Pair, tmp_path: Path
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"method: linear\nmllm: {pair.mllm}\nreasoner: {source}\n")
    refused(3, "drift-merge", "run", str(recipe), "-o", str(tmp_path / "out"))
    recipe.write_text(f"merge_method: linear\nmodels:\n  - model: {source}\n  - model: b/c\n")
    refused(3, "drift-merge", "run", str(recipe), "-o", str(tmp_path / "out"))


def test_a_recipe_that_is_nested_too_deep_is_refused(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    for text in (f"method: {'[' * 9999}", '{"method": ' + "[" * 9999):
        recipe.write_text(text)
        refused(2, "drift-merge", "run", str(recipe), "-o", str(tmp_path / "out"))


@pytest.mark.parametrize("base", ["x" * 300, "a" * 70000, "\0"])
def test_an_adapter_whose_base_is_no_possible_path_is_refused(
    base: str, pair: Pair, tmp_path: Path
) -> None:
    chosen = modules_of(pair.reasoner, lambda name: "q_proj" in name)
    write_adapter(tmp_path / "lora", pair.reasoner, chosen, base_model_name_or_path=base)
    refused(3, "drift-prior", "align", str(tmp_path / "lora"), str(pair.mllm))


@pytest.mark.parametrize("kind", [[], {}, ["linear"], 7])
def test_a_scaling_of_no_known_kind_is_compared_as_it_is(kind: object, tmp_path: Path) -> None:
    pair = make_pair(tmp_path, layers=1, reasoner_config={"rope_scaling": {"rope_type": kind}})
    assert run("drift-prior", "align", *pair.arguments).code == 0


def without_shape(manifest: dict[str, object]) -> None:
    tensors = manifest["tensors"]
    assert isinstance(tensors, dict)
    del next(iter(tensors.values()))["shape"]


CHANGES: dict[str, Callable[[dict[str, object]], object]] = {
    "a tensor without a shape": without_shape,
    "no sources": lambda manifest: manifest.update(sources={}),
    "a number for parameters": lambda manifest: manifest.update(parameters=3),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_manifest_that_was_changed_is_refused_wherever_it_is_opened(
    change: str, pair: Pair, tmp_path: Path
) -> None:
    prior = tmp_path / "prior"
    assert run("drift-prior", "compute", *pair.arguments, "-o", str(prior)).code == 0
    file = prior / "prior.json"
    manifest = json.loads(file.read_text())
    CHANGES[change](manifest)
    file.write_text(json.dumps(manifest))
    out = str(tmp_path / "out")
    for words in (
        ["drift-prior", "inspect", str(prior)],
        ["drift-prior", "verify", str(prior)],
        ["drift-prior", "apply", str(prior), str(pair.mllm), "-o", out],
        ["drift-prior", "compress", str(prior), "--dtype", "int8", "-o", out],
        ["drift-merge", "run", str(file), "-o", out],
    ):
        assert "was changed after it was written" in refused(1, *words)
    file.write_text("[" * 9999)
    refused(5, "drift-prior", "inspect", str(prior))
