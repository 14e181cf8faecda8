"""A user's own merge method, from a file or an object, has everything that a built-in one has."""

import json
from pathlib import Path

import pytest

import drift_merge
from drift_merge.engine import workers
from drift_merge.errors import RecipeError
from drift_merge.recipes.own_methods import load_methods
from tests import checkpoints as c

METHODS = """
from drift_merge import merge_method


def largest(read, settings):
    return max((float(chunk.reasoners[0].abs().max()) for chunk in read()), default=0.0)


@merge_method(defaults={"weight": 0.5, "damping": 0.25, "scale": 1.0}, measure=largest)
def damped(chunk, state, settings):
    "mllm + damping scale w (reasoner - mllm) / max |reasoner|."
    change = chunk.reasoners[0].sub_(chunk.mllm)
    factor = settings.numbers["damping"] * settings.numbers["scale"] * settings.weights[0]
    return chunk.mllm.add_(change, alpha=factor / (state or 1.0))


@merge_method(name="toward", adds_to_mllm=True, defaults={"weight": 0.1, "seed": 0, "how": "all"})
def one_of_ours(chunk, state, settings):
    "mllm + w (reasoner - mllm)."
    assert settings.words["how"] == "all"
    return chunk.mllm.add_(chunk.reasoners[0].sub_(chunk.mllm), alpha=settings.weights[0])
"""


@pytest.fixture
def pair(tmp_path):
    return c.make_pair(tmp_path, dtype="F32")


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "my_methods.py"
    path.write_text(METHODS)
    return path


@pytest.fixture
def recipe(tmp_path, pair):
    path = tmp_path / "recipe.yaml"
    path.write_text("method: damped\nreasoner: reasoner\nmllm: mllm\nweight: 0.5\ndamping: 0.5\n")
    return path


def expected(pair, name, factor):
    """The formula on whole float64 tensors."""
    theta = c.read_tensors(pair.mllm)[name].values.astype("float64")
    reasoner = c.read_tensors(pair.reasoner)[name].values.astype("float64")
    return theta + factor * (reasoner - theta) / abs(reasoner).max()


def test_the_formula_is_applied_to_every_selected_tensor(pair, file, recipe, call, tmp_path):
    result = call("drift-merge", "run", recipe, "--methods", file, "-o", tmp_path / "out")
    assert result.code == 0, result.err
    found = c.read_tensors(tmp_path / "out")
    own = c.read_tensors(pair.mllm)
    for name in ("model.layers.0.mlp.up_proj.weight", "model.norm.weight"):
        wanted = expected(pair, name, 0.25)
        assert abs(found[name].values - wanted).max() <= 4 * 2.0**-24 * abs(wanted).max()
    assert found["model.embed_tokens.weight"] == own["model.embed_tokens.weight"]
    assert all(found[name] == own[name] for name in own if name.startswith("visual."))


def test_python_workers_and_a_file_give_the_same_bytes(
    pair, file, recipe, call, tmp_path, monkeypatch
):
    assert call("drift-merge", "run", recipe, "--methods", file, "-o", tmp_path / "out").code == 0
    damped = load_methods(file)["damped"]
    monkeypatch.setattr(workers, "PROCESS_BYTES", 0)
    drift_merge.merge(
        damped,
        pair.reasoner,
        pair.mllm,
        tmp_path / "two",
        weights=0.5,
        options={"damping": 0.5},
        threads=2,
        progress=False,
    )
    assert c.read_tensors(tmp_path / "two") == c.read_tensors(tmp_path / "out")


def test_the_manifest_makes_it_again_and_verify_computes_it_again(
    pair, file, recipe, call, tmp_path
):
    call("drift-merge", "run", recipe, "--methods", file, "-o", tmp_path / "out")
    again = ("drift-merge", "run", tmp_path / "out", "-o", tmp_path / "again")
    refused = call(*again)
    assert refused.code == 2
    assert "--methods FILE" in refused.err
    assert call(*again, "--methods", file).code == 0
    assert c.read_tensors(tmp_path / "again") == c.read_tensors(tmp_path / "out")
    sources = ("--reasoner", pair.reasoner, "--mllm", pair.mllm)
    verified = call("drift-merge", "verify", tmp_path / "out", *sources, "--methods", file)
    assert verified.code == 0, verified.err
    assert "Computed again" in verified.out
    file.write_text(METHODS.replace("change = chunk", "change =  chunk"))
    changed = call("drift-merge", "verify", tmp_path / "out", *sources, "--methods", file)
    assert changed.code == 2
    assert "fingerprint" in changed.err


def test_a_sweep_varies_its_own_numbers(pair, file, recipe, call, tmp_path):
    words = ("--set", "damping=0.1,0.2", "--methods", file, "-o", tmp_path / "sweep", "--json")
    result = call("drift-merge", "sweep", recipe, *words)
    assert [row["settings"] for row in result.json["outputs"]] == [
        {"damping": 0.1},
        {"damping": 0.2},
    ]
    name = "model.norm.weight"
    for factor in (0.1, 0.2):
        found = c.read_tensors(tmp_path / "sweep" / f"damping={factor}")[name].values
        assert abs(found - expected(pair, name, 0.5 * factor)).max() < 1e-6


def test_weight_0_copies_the_mllm_where_the_method_adds_to_it(pair, file, tmp_path):
    toward = load_methods(file)["toward"]
    made = drift_merge.merge(
        toward, pair.reasoner, pair.mllm, tmp_path / "out", weights=0.0, progress=False
    )
    assert c.read_tensors(tmp_path / "out") == c.read_tensors(pair.mllm)
    assert set(made.manifest["counts"]) == {"copy"}
    assert json.loads(json.dumps(made.manifest)) == made.manifest


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "makes no merge method"),
        ("1 / 0", "fails: ZeroDivisionError"),
        (
            "from drift_merge import merge_method\n@merge_method()\ndef ties(c, s, t): 'x'",
            "there is one of that name",
        ),
        (
            "from drift_merge import merge_method\n@merge_method(base='maybe')\ndef f(c, s, t): ''",
            "maybe",
        ),
    ],
)
def test_a_file_that_makes_no_method_is_refused(tmp_path, text, message):
    path = tmp_path / "methods.py"
    path.write_text(text)
    with pytest.raises(RecipeError, match=message) as raised:
        load_methods(path)
    assert raised.value.remedy


def test_a_file_that_is_not_there_and_an_unknown_method_are_refused(tmp_path, recipe, file, call):
    with pytest.raises(RecipeError, match="no such file"):
        load_methods(Path("nowhere.py"))
    recipe.write_text(recipe.read_text().replace("damped", "dampened"))
    result = call("drift-merge", "run", recipe, "--methods", file, "-o", tmp_path / "out")
    assert result.code == 2
    assert "Did you mean damped?" in result.err
