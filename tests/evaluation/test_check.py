"""`drift-merge check` on a tiny real LLaVA of transformers, with tokenizer and processor."""

import json

import pytest

from drift_merge.evaluation.health import BROKEN
from tests.evaluation.tiny_llava import make_llava_pair

transformers = pytest.importorskip("transformers")
pytestmark = [
    pytest.mark.engines,
    pytest.mark.timeout(900),
    pytest.mark.filterwarnings("default"),  # transformers' own
]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llava")
    make_llava_pair(folder)
    return folder


def merge(call, pair, out, weight):
    result = call(
        *("drift-merge", "linear", pair / "reasoner", pair / "mllm", "-o", out),
        *("--weight", weight, "-q"),
    )
    assert result.code == 0, result.err


def test_a_sound_merge_answers_about_pictures_and_text_beside_its_mllm(call, pair, tmp_path):
    merge(call, pair, tmp_path / "merged", 0.1)
    words = ("--mllm", pair / "mllm", "--max-tokens", "8")
    result = call("drift-merge", "check", tmp_path / "merged", *words, "--json")
    assert result.code == 0, result.out
    found = result.json
    assert (found["own"]["num_answers"], found["own"]["num_pictures"]) == (5, 2)
    assert found["own"]["missing_keys"] == found["own"]["unexpected_keys"] == []
    assert found["own"]["perplexity"] > 1
    assert found["unmerged"]["num_answers"] == 5
    assert found["verdict"] in ("sound", "suspicious")  # random weights: how long it talks is luck
    assert any("whether answers are right" in note for note in found["not_seen"])


def test_a_broken_merge_is_said_to_be_broken(call, pair, tmp_path):
    import torch
    from safetensors.torch import load_file, save_file

    merge(call, pair, tmp_path / "merged", 0.1)
    file = tmp_path / "merged" / "model.safetensors"
    tensors = load_file(file)
    kept = {n: t for n, t in tensors.items() if "layers.1.mlp.up_proj" not in n}
    save_file(kept, file, metadata={"format": "pt"})
    words = ("--mllm", pair / "mllm", "--max-tokens", "8")
    result = call("drift-merge", "check", tmp_path / "merged", *words)
    assert result.code == 1
    assert "1 parameter(s) missing" in result.err
    assert "whether answers are right" in result.err
    save_file(
        {
            n: torch.full_like(t, float("nan")) if "layers.1.mlp.up" in n else t
            for n, t in tensors.items()
        },
        file,
        metadata={"format": "pt"},
    )
    result = call("drift-merge", "check", tmp_path / "merged", *words, "--json")
    assert result.code == 1
    assert result.json["verdict"] == BROKEN
    assert "not finite" in result.json["sentence"]


def test_without_a_tokenizer_only_loading_is_checked_and_said(call, pair, tmp_path):
    merge(call, pair, tmp_path / "merged", 0.1)
    for path in (tmp_path / "merged").iterdir():
        if path.name.startswith(("tokenizer", "processor", "chat", "preprocessor")):
            path.unlink()
    result = call("drift-merge", "check", tmp_path / "merged")
    assert result.code == 0, result.err
    assert "nothing else was looked at" in result.out
    assert "no tokenizer" in result.err
    assert "name it with --mllm" in result.err


def test_what_transformers_cannot_load_is_an_error(call, pair, tmp_path):
    merge(call, pair, tmp_path / "merged", 0.1)
    config = tmp_path / "merged" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"model_type": "no-such"}))
    result = call("drift-merge", "check", tmp_path / "merged", "--mllm", pair / "mllm")
    assert result.code == 5
    assert "cannot be loaded by transformers" in result.err
    result = call("drift-merge", "check", pair / "mllm", "--python", "no-such-python")
    assert result.code == 7
