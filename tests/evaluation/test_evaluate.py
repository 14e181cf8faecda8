"""`drift-merge evaluate` with stand-ins for the kits: both ends alike, once, with an interval."""

import json
import os

import pytest
import yaml

import drift_merge
from drift_merge.evaluation.kits import lmms_eval, vlmevalkit
from drift_merge.merges.evaluations import dataset_of
from tests import checkpoints as c
from tests.evaluation.kits import write_kits
from tests.runs import run_linear

KIT = ("--kit-path", "VLMEvalKit")


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A merge beside its mllm, and the kits."""
    pair = c.make_pair(tmp_path)
    run_linear(*pair, tmp_path / "merged", 0.5)
    site, clone = write_kits(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(site))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path, clone


def evaluate(call, *words):
    result = call("drift-merge", "evaluate", "merged", "--json", *words)
    assert result.code == 0, result.out + result.err
    return result.json


def calls(place):
    return {
        end: json.loads((place / "merged.evaluations" / end / "called.json").read_text())
        for end in ("merge", "unmerged")
    }


def test_lmms_eval_runs_alike_on_both_ends_and_its_items_are_paired(place, call):
    folder, _ = place
    found = evaluate(call, "--with", "lmms-eval", "--limit", "40", "--max-tokens", "512")
    assert [row["task"] for row in found["results"]] == list(lmms_eval.DEFAULT_TASKS)
    row = found["results"][0]
    assert row["metric"] == "acc_score,none"
    assert row["paired"]["num_items"] == 40
    assert row["paired"]["difference"] == pytest.approx(row["value"] - row["unmerged"])
    both = calls(folder)
    differing = {k for k in both["merge"] if both["merge"][k] != both["unmerged"][k]}
    assert differing == {"model_args", "output_path"}
    for end, path in (("merge", "merged"), ("unmerged", "mllm")):
        assert both[end]["model"] == "qwen2_5_vl"
        assert both[end]["model_args"] == (
            f"pretrained={folder / path},min_pixels=200704,max_pixels=1003520"
        )
        assert both[end]["gen_kwargs"] == "max_new_tokens=512"


@pytest.mark.slow
def test_the_unmerged_mllm_is_evaluated_once_for_the_same_settings_and_files(place, call):
    folder, _ = place
    words = ("--with", "lmms-eval", "--tasks", "mathvista_testmini_cot_reasoning", "--limit")
    first = evaluate(call, *words, "20")
    called = folder / "merged.evaluations" / "unmerged" / "called.json"
    called.unlink()
    again = evaluate(call, *words, "20")
    assert not called.exists()
    assert again["results"] == first["results"]
    evaluate(call, *words, "21")  # other settings
    assert called.exists()
    called.unlink()
    file = folder / "mllm" / "model.safetensors"
    os.utime(file, ns=(0, file.stat().st_mtime_ns + 1))  # other files
    evaluate(call, *words, "20")
    assert called.exists()


@pytest.mark.slow
def test_vlmevalkit_gets_its_config_and_its_tables_are_read(place, call):
    folder, clone = place
    tasks = "MathVista_MINI,MMStar,Own=ImageVQADataset"
    words = ("--with", "vlmevalkit", "--kit-path", clone, "--tasks", tasks, "--max-tokens", "64")
    found = evaluate(call, *words, "--model-args", "use_vllm=true,temperature=0")
    config = json.loads((folder / "merged.evaluations" / "merge" / "eval.json").read_text())
    assert config["data"]["MMStar"] == {"class": "ImageMCQDataset", "dataset": "MMStar"}
    assert config["data"]["Own"] == {"class": "ImageVQADataset", "dataset": "Own"}
    assert config["model"]["model"] == {
        "class": "Qwen2VLChat",
        "model_path": str(folder / "merged"),
        "min_pixels": 200704,
        "max_pixels": 1003520,
        "max_new_tokens": 64,
        "use_vllm": True,
        "temperature": 0,
    }
    assert [row["metric"] for row in found["results"]] == ["acc", "Overall", "Overall"]
    for row in found["results"]:
        assert row["paired"]["num_items"] == 64
        assert 100 * row["paired"]["difference"] == pytest.approx(row["difference"])


def test_the_result_is_in_manifest_card_and_eval_results_and_the_merge_verifies(place, call):
    folder, _ = place
    before = drift_merge.open_merge(folder / "merged").manifest
    words = ("--with", "lmms-eval", "--tasks", "mathvista_testmini_cot_reasoning,other_task")
    found = evaluate(call, *words)
    evaluate(call, "--with", "lmms-eval", "--tasks", "other_task", "--limit", "9")
    merge = drift_merge.open_merge(folder / "merged")
    drift_merge.verify_merge(merge)
    first, second = merge.manifest["evaluations"]
    assert first["results"] == found["results"]
    assert second["settings"]["limit"] == 9
    assert "python" not in json.dumps(first["settings"])
    assert merge.tensors == before["tensors"]
    card = (folder / "merged" / "README.md").read_text()
    front = yaml.safe_load(card.split("---\n")[1])
    metrics = front["model-index"][0]["results"][0]["metrics"]
    assert metrics[0]["value"] == found["results"][0]["value"]
    assert len(front["model-index"][0]["results"]) == 3
    assert card.count("| other_task (acc_score,none) | lmms-eval |") == 2
    [entry] = yaml.safe_load(
        (folder / "merged/.eval_results/mathvista_testmini_cot_reasoning.yaml").read_text()
    )
    assert entry["dataset"]["id"] == "AI4Math/MathVista"
    assert entry["value"] == found["results"][0]["value"]
    again = drift_merge.run(folder / "merged", folder / "again", progress=False)
    assert again.tensors == merge.tensors


@pytest.mark.slow
def test_a_card_that_somebody_has_edited_stays(place, call):
    folder, _ = place
    card = folder / "merged" / "README.md"
    card.write_text(card.read_text() + "My own words.\n")
    before = card.read_bytes()
    words = ("--with", "lmms-eval", "--tasks", "x_task", "--limit", "4")
    result = call("drift-merge", "evaluate", "merged", *words)
    assert result.code == 0, result.err
    assert "edited" in result.err
    assert card.read_bytes() == before


def test_any_other_kit_is_a_command_and_nothing_is_recorded_on_request(place, call):
    folder, _ = place
    code = "import sys; open(sys.argv[2] + '/i.json', 'w').write('[1, 0]'); print(0.25)"
    (folder / "own.py").write_text(code)
    before = (folder / "merged" / "drift_merge.json").read_bytes()
    command = "python own.py {model} {out}"
    found = evaluate(call, "--with", command, "--items", "i.json:*", "--no-record")
    assert (folder / "merged" / "drift_merge.json").read_bytes() == before
    [row] = found["results"]
    assert (row["task"], row["value"], row["paired"]["is_noise"]) == ("score", 0.25, True)
    result = call("drift-merge", "evaluate", "merged", "--with", command, "--items", "i.json:*")
    assert "within noise" in result.out


@pytest.mark.parametrize(
    ("words", "code", "named"),
    [
        (["--with", "lmms-evla"], 2, "Did you mean lmms-eval"),
        (["--with", "vlmevalkit"], 2, "--tasks is missing"),
        (["--with", "vlmevalkit", "--tasks", "MMStar"], 2, "run.py"),
        (["--with", "vlmevalkit", *KIT, "--tasks", "Nothing"], 2, "Nothing="),
        (
            ["--with", "vlmevalkit", "--tasks", "A=B", "--kit-path", "VLMEvalKit", "--limit", "3"],
            2,
            "limit",
        ),
        (["--with", "lmms-eval", "--metric", "stdout"], 2, "of commands"),
        (["--with", "lmms-eval", "--python", "no-such-python"], 7, "cannot be started"),
        (["--with", "python -c 1 {model}"], 7, "no number"),
        (["--with", "lmms-eval", "--mllm", "./nowhere"], 3, "nowhere"),
    ],
)
def test_what_cannot_be_evaluated_is_named(place, call, words, code, named):
    result = call("drift-merge", "evaluate", "merged", *words)
    assert result.code == code, result.err
    assert named in result.err


def test_a_kit_that_is_not_there_is_asked_for_by_its_interpreter(place, call, monkeypatch):
    monkeypatch.delenv("PYTHONPATH")
    result = call("drift-merge", "evaluate", "merged", "--with", "lmms-eval")
    assert result.code == 7
    assert "--python PATH" in result.err


def test_an_architecture_that_no_table_has_needs_the_kits_own_name(place, call):
    folder, _ = place
    for name in ("mllm", "merged"):
        config = json.loads((folder / name / "config.json").read_text())
        (folder / name / "config.json").write_text(json.dumps(config | {"model_type": "novel"}))
    result = call("drift-merge", "evaluate", "merged", "--with", "lmms-eval")
    assert result.code == 2
    assert "--kit-model NAME" in result.err
    evaluate(call, "--with", "lmms-eval", "--kit-model", "vllm", "--no-record", "--tasks", "t")
    assert calls(folder)["merge"]["model_args"] == f"model={folder / 'merged'}"


def test_the_tables_know_the_families_that_people_merge():
    for kind in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "llava_next", "llava_onevision", "idefics2"):
        assert kind in lmms_eval.MODELS
        assert kind in vlmevalkit.MODELS
    for kind in ("qwen3_5", "llava", "idefics3", "smolvlm", "internvl", "gemma3", "gemma4"):
        assert kind in lmms_eval.MODELS
    assert dataset_of("MathVista_MINI") == dataset_of("mathvista_testmini_cot_reasoning")
    assert dataset_of("my_task") is None
