"""`--config FILE`: flags win, unknown keys are errors, paths are relative to the file."""

import json
from pathlib import Path

import pytest

from tests import checkpoints as c

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.y*ml"))


@pytest.fixture
def pair(tmp_path):
    return c.make_pair(tmp_path / "models")


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_sources_and_options_come_from_the_file(call, pair, tmp_path):
    file = write(
        tmp_path / "models/run.yaml",
        "reasoner: reasoner\nmllm: mllm\noutput: made/out\nmodules: mlp\ndtype: float32\n"
        "layers: 0\nmax_shard_size: 2KB\nquiet: true\n",
    )
    result = call("drift-prior", "compute", "--config", file)
    out = tmp_path / "models/made/out"
    assert result == (0, f"{out}\n", "")
    manifest = json.loads((out / "prior.json").read_text())
    assert manifest["parameters"]["modules"] == "mlp"
    assert manifest["parameters"]["dtype"] == "float32"
    assert set(manifest["tensors"]) == {
        f"layers.0.mlp.{n}_proj.weight" for n in ("gate", "up", "down")
    }
    assert len(manifest["shards"]) > 1


def test_a_flag_and_an_argument_override_the_file(call, pair, tmp_path):
    file = write(
        tmp_path / "run.yaml",
        "reasoner: models/absent\nmllm: models/absent\nmodules: mlp\noutput: one\n",
    )
    flags = ("--modules", "attn", "-o", tmp_path / "two", "--config", file)
    assert call("drift-prior", "compute", *pair.arguments, *flags).code == 0
    assert not (tmp_path / "one").exists()
    manifest = json.loads((tmp_path / "two/prior.json").read_text())
    assert manifest["parameters"]["modules"] == "attn"


@pytest.mark.parametrize(
    ("text", "weights"),
    [("weight: 0.25", [0.25]), ("weight: [0.25]", [0.25]), ("weight: 1", [1.0]), ("", [0.1])],
)
def test_a_weight_may_be_a_number_or_a_list(call, pair, tmp_path, text, weights):
    file = write(tmp_path / "run.yaml", f"reasoner: models/reasoner\nmllm: models/mllm\n{text}\n")
    flags = ("--config", file, "-o", tmp_path / "out")
    result = call("drift-merge", "linear", *flags)
    assert result.code == 0, result.err
    manifest = json.loads((tmp_path / "out/drift_merge.json").read_text())
    assert [s["weight"] for s in manifest["sources"]["reasoners"]] == weights


def test_several_reasoners_are_a_list(call, pair, tmp_path):
    file = write(
        tmp_path / "run.yaml",
        "reasoner: [models/reasoner, models/mllm]\nmllm: models/mllm\nweight: [0.1, 0.2]\n",
    )
    result = call("drift-merge", "linear", "--config", file, "-o", tmp_path / "out", "--json")
    assert result.code == 0
    assert [s["label"] for s in result.json["sources"]["reasoners"]] == ["reasoner", "mllm"]


@pytest.mark.parametrize(
    ("text", "modules"),
    [("modules: [attn, norm]", "attn,norm"), ("modules: attn,norm", "attn,norm")],
)
def test_modules_may_be_a_list(call, pair, tmp_path, text, modules):
    file = write(tmp_path / "run.yaml", f"{text}\n")
    flags = ("--config", file, "-o", tmp_path / "out", "--json")
    result = call("drift-prior", "compute", *pair.arguments, *flags)
    assert result.code == 0, result.out
    assert result.json["parameters"]["modules"] == modules


@pytest.mark.parametrize("layers", ["1:2", "1", "[0, 1]", "0:1"])
def test_layers_are_read_as_written_not_as_a_sexagesimal_number(call, tmp_path, layers):
    pair = c.make_pair(tmp_path / "models", layers=3)
    file = write(tmp_path / "run.yaml", f"layers: {layers}\n")
    result = call("drift-prior", "align", *pair.arguments, "--config", file, "--json")
    assert result.code == 0, result.out
    count = 2 if "[" in layers else 1
    assert result.json["coverage"]["selected"] == 10 * count


def test_an_empty_value_is_as_if_the_key_were_not_there(call, pair, tmp_path):
    file = write(tmp_path / "run.yaml", "base: null\nlayers:\nweight: ~\nmodules: mlp\n")
    flags = ("--config", file, "-o", tmp_path / "out", "--json")
    result = call("drift-merge", "linear", *pair.arguments, *flags)
    assert result.code == 0, result.out
    assert result.json["sources"]["reasoners"][0]["weight"] == 0.1
    assert result.json["parameters"]["layers"] is None


@pytest.mark.parametrize(
    ("key", "meant"), [("module", "modules"), ("ouput", "output"), ("weigth", "weight")]
)
def test_an_unknown_key_is_exit_2_and_names_the_nearest(call, pair, tmp_path, key, meant):
    file = write(tmp_path / "run.yaml", f"{key}: x\n")
    result = call("drift-prior", "align", *pair.arguments, "--config", file)
    assert result.code == 2
    assert f"unknown key {key!r}. Did you mean {meant}?" in result.err
    assert str(file) in result.err


def test_a_key_of_another_command_is_named_on_stderr_and_has_no_effect(call, pair, tmp_path):
    file = write(tmp_path / "run.yaml", "weight: 0.3\noutput: out\nmodules: mlp\n")
    result = call("drift-prior", "align", *pair.arguments, "--config", file)
    assert result.code == 0
    assert "no option of align, ignored: weight, output" in result.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("text", ["- a\n", "just text\n", "a: [\n", "\x00", ""])
def test_a_file_that_is_no_mapping_is_exit_2(call, pair, tmp_path, text):
    file = write(tmp_path / "run.yaml", text)
    result = call("drift-prior", "align", *pair.arguments, "--config", file)
    assert result.code == 2
    assert "run.yaml" in result.err
    assert "Traceback" not in result.err


def test_a_file_that_is_not_there_is_exit_2(call, pair, tmp_path):
    result = call("drift-prior", "align", *pair.arguments, "--config", tmp_path / "absent.yaml")
    assert result.code == 2
    assert "absent.yaml" in result.err


@pytest.mark.parametrize("text", ["dtype: int4", "threads: 0", "on-mismatch: maybe", "device: tpu"])
def test_a_wrong_value_is_exit_2_as_on_the_command_line(call, pair, tmp_path, text):
    file = write(tmp_path / "run.yaml", f"{text}\n")
    flags = ("--config", file, "-o", tmp_path / "out")
    assert call("drift-prior", "compute", *pair.arguments, *flags).code == 2


def test_a_hub_id_in_the_file_stays_a_hub_id(tmp_path):
    from drift_merge.recipes.files import read_recipe

    file = write(tmp_path / "run.yaml", "reasoner: org/name@main\nmllm: there\nbase: ~/absent/x\n")
    (tmp_path / "there").mkdir()
    assert read_recipe(file).values == {
        "reasoner": "org/name@main",
        "mllm": str(tmp_path / "there"),
        "base": "~/absent/x",
    }


@pytest.mark.parametrize("file", CONFIGS, ids=lambda path: path.stem)
def test_every_published_config_is_read(file):
    from drift_merge.recipes.files import read_recipe

    values = read_recipe(file).values
    assert {"reasoner", "mllm"} <= set(values)
