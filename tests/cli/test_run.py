"""`drift-merge run` and `--print-config`: a file says what a command line says."""

import json
import shlex

import pytest
import yaml

from tests import checkpoints as c

CALLS = {
    "linear": "linear reasoner mllm --weight attn=0.1,0.3 --modules full --dtype float32 -o out",
    "several": "linear reasoner other mllm --weight 0.1 --weight [0,0.2] -o out",
    "slerp": "slerp reasoner mllm --t 0.25 --weight [0,1] --variant mergekit -o out",
    "ties": "ties reasoner mllm --base base --density 0.4 --mllm-weight 0.5 --trim global -o out",
    "dare": "dare-ties reasoner other mllm --base base --weight 0.4 --seed 3 "
    "--variant mergekit --no-rescale -o out",
    "layer-swap": "layer-swap reasoner mllm --keep-layers 0 --transition 1 -o out",
    "nuslerp": "nuslerp reasoner mllm --no-flatten --max-shard-size 4KB -o out",
    "skip": "linear reasoner mllm --on-mismatch skip --allow-nonfinite --layers 1 -o out",
}
LINEAR = "method: linear\nreasoner: reasoner\nmllm: mllm\nweight: 0.25\n"


@pytest.fixture
def models(tmp_path, monkeypatch):
    """A directory with `reasoner`, `mllm`, `other` and `base` in it; the current one."""
    words = {"tokenizer.json": c.tokenizer()}
    c.make_pair(tmp_path, reasoner_sidecars=words, mllm_sidecars=words)
    for seed, name in enumerate(("base", "other"), start=7):
        tensors = c.reasoner_tensors(seed=seed)
        c.write_checkpoint(tmp_path / name, tensors, c.text_config(), sidecars=words)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(directory, text, name="recipe.yaml"):
    (directory / name).write_text(text)
    return directory / name


def data(directory):
    """Every tensor; the manifests differ in how the sources were written."""
    return c.read_tensors(directory)


def same(one, other):
    return c.read_files(one) == c.read_files(other)


@pytest.mark.parametrize("words", CALLS.values(), ids=list(CALLS))
def test_a_printed_call_run_from_elsewhere_makes_the_same(call, models, monkeypatch, words):
    arguments = shlex.split(words)
    printed = call("drift-merge", *arguments, "--print-config")
    assert (printed.code, printed.err) == (0, "")
    assert not (models / "out").exists()
    assert yaml.safe_load(printed.out)["method"] == arguments[0]
    elsewhere = models / "else/where"
    elsewhere.mkdir(parents=True)
    file = write(elsewhere, printed.out)
    assert call("drift-merge", *arguments).code == 0
    (models / "out").rename(models / "first")
    monkeypatch.chdir(elsewhere)
    result = call("drift-merge", "run", file)
    assert result.code == 0, result.err
    first, again = (
        json.loads((models / name / "drift_merge.json").read_bytes()) for name in ("first", "out")
    )
    assert first["parameters"] == again["parameters"]
    assert data(models / "first") == data(models / "out")
    assert call("drift-merge", "run", file, "--print-config").out == printed.out


def test_a_printed_prior_runs_and_so_does_its_manifest_in_both_programs(call, models):
    arguments = ("compute", "reasoner", "mllm", "--base", "base", "--modules", "mlp")
    printed = call("drift-prior", *arguments, "--print-config")
    assert printed.code == 0, printed.err
    file = write(models, printed.out)
    assert call("drift-prior", *arguments, "-o", "one").code == 0
    assert call("drift-merge", "run", file, "-o", "two").code == 0
    assert data(models / "one") == data(models / "two")
    assert call("drift-merge", "run", "one/prior.json", "-o", "three").code == 0
    assert call("drift-prior", "compute", "--config", "one/prior.json", "-o", "four").code == 0
    assert same(models / "one", models / "three")
    assert same(models / "one", models / "four")


@pytest.mark.parametrize("words", CALLS.values(), ids=list(CALLS))
def test_a_manifest_given_back_makes_the_same_bytes(call, models, words):
    assert call("drift-merge", *shlex.split(words)).code == 0
    for given in ("out", "out/drift_merge.json"):
        result = call("drift-merge", "run", given, "-o", "again", "--overwrite")
        assert result.code == 0, result.err
        assert "Warning [layout]" not in result.err
        assert same(models / "out", models / "again")


def test_the_manifest_of_an_applied_prior_makes_the_same_bytes(call, models):
    assert call("drift-prior", "compute", "reasoner", "mllm", "-o", "prior").code == 0
    assert call("drift-prior", "apply", "prior", "mllm", "--scale", "0.3", "-o", "one").code == 0
    result = call("drift-merge", "run", "one", "-o", "two")
    assert result.code == 0, result.err
    assert same(models / "one", models / "two")


def test_a_source_that_has_changed_since_its_manifest_is_told_on_stderr(call, models):
    assert call("drift-merge", *shlex.split(CALLS["linear"])).code == 0
    tensors = data(models / "mllm") | {"visual.more": c.store([1.0])}
    c.write_shard(models / "mllm/model.safetensors", tensors)
    result = call("drift-merge", "run", "out", "-o", "again")
    assert result.code == 0
    assert "Warning [layout]: the mllm mllm is not what drift_merge.json" in result.err


def test_flags_and_sources_override_the_file(call, models):
    file = write(models, f"{LINEAR}modules: mlp\noutput: one\n")
    flags = ("--weight", "0.5", "--reasoner", "other", "--modules", "attn", "-o", "two")
    result = call("drift-merge", "run", *flags, file, "--json")
    assert result.code == 0, result.out
    assert not (models / "one").exists()
    assert result.json["parameters"]["weights"] == [0.5]
    assert result.json["parameters"]["modules"] == "attn"
    assert result.json["sources"]["reasoners"][0]["label"] == "other"


def test_how_it_runs_may_be_in_the_file(call, models):
    file = write(models, f"{LINEAR}output: made\nquiet: true\nthreads: 1\n")
    assert call("drift-merge", "run", file) == (0, f"{models / 'made'}\n", "")
    assert call("drift-merge", "run", write(models, f"{LINEAR}threads: 0\n"), "-o", "x").code == 2


def test_a_dry_run_writes_nothing(call, models):
    result = call("drift-merge", "run", write(models, LINEAR), "-o", "out", "-n", "-v")
    assert result.code == 0
    assert "0.25" in result.out
    assert not (models / "out").exists()


def test_an_output_must_be_named_somewhere(call, models):
    result = call("drift-merge", "run", write(models, LINEAR))
    assert result.code == 2
    assert "names no output" in result.err
    assert "-o OUT" in result.err


def test_a_flag_that_the_method_does_not_have_is_refused(call, models):
    result = call("drift-merge", "run", write(models, LINEAR), "-o", "out", "--density", "0.5")
    assert result.code == 2
    assert "linear has no option density" in result.err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"{LINEAR}wieght: 1\n", "line 5: unknown key 'wieght'. Did you mean weight?"),
        (LINEAR.replace("linear", "liner"), "line 1: method: there is no method 'liner'."),
        ("method: linear\n", "reasoner is missing"),
        ("- a\n", "is not a mapping"),
        (f"merge_method: ties\n{LINEAR}", "mergekit's method: unknown key"),
    ],
)
def test_an_error_in_the_file_is_exit_2_with_its_place(call, models, text, message):
    result = call("drift-merge", "run", write(models, text), "-o", "out")
    assert result.code == 2
    assert message in result.err
    assert "recipe.yaml" in result.err


def test_a_file_that_is_not_there_is_exit_2(call, models):
    result = call("drift-merge", "run", "absent.yaml", "-o", "out")
    assert result.code == 2
    assert "absent.yaml" in result.err


def test_a_recipe_of_mergekit_runs_and_says_how_it_was_read(call, models):
    text = (
        "merge_method: linear\nmodels:\n- {model: mllm, parameters: {weight: 1}}\n"
        "- {model: reasoner, parameters: {weight: 0.25}}\n"
    )
    file = write(models, text, "mergekit.yml")
    result = call("drift-merge", "run", file, "-o", "out")
    assert result.code == 0, result.err
    assert "Read as mergekit's linear: mllm" in result.err
    printed = call("drift-merge", "run", file, "--print-config")
    ours = write(models, printed.out)
    assert call("drift-merge", "run", ours, "-o", "two").code == 0
    assert data(models / "out") == data(models / "two")


def test_a_recipe_serves_config_of_its_own_and_of_other_commands(call, models):
    file = write(models, LINEAR)
    result = call("drift-merge", "linear", "--config", file, "-o", "one")
    assert result.code == 0
    assert "ignored" not in result.err
    result = call("drift-prior", "compute", "--config", file, "-o", "two")
    assert result.code == 0
    assert "no option of compute, ignored: method, weight" in result.err


def test_a_call_without_an_output_prints_but_does_not_run(call, models):
    printed = call("drift-merge", "linear", "reasoner", "mllm", "--print-config")
    assert yaml.safe_load(printed.out) == {
        "method": "linear",
        "reasoner": str(models / "reasoner"),
        "mllm": str(models / "mllm"),
    }
    result = call("drift-merge", "linear", "reasoner", "mllm")
    assert result.code == 2
    assert "Missing option '-o' / '--output'" in result.err


def test_a_wrong_call_is_not_printed(call, models):
    result = call("drift-merge", "ties", "reasoner", "mllm", "--print-config")
    assert result.code == 2
    assert "ties needs a base" in result.err
    assert result.out == ""
