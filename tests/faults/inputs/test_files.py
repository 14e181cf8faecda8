"""Which files are the model; wrapped names; what is no number."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from drift_merge.errors import SourceError
from tests import checkpoints as c
from tests.checkpoints import HIDDEN, Pair, Stored, make_pair, read_tensors, store
from tests.faults.harness import assert_refusal, command, refused, run
from tests.faults.inputs.runs import ROOT, Q, manifest, succeed

# Which files are the model, where no index says it.


def test_of_two_formats_the_one_with_the_names_of_transformers_is_taken(tmp_path: Path) -> None:
    pair = make_pair(tmp_path, layers=1, num_shards=2)
    (pair.mllm / "model.safetensors.index.json").unlink()
    c.write_shard(pair.mllm / "consolidated.safetensors", {"tok_embeddings.weight": store([1.0])})
    expected = read_tensors(make_pair(tmp_path / "plain", layers=1).mllm)
    said = succeed(pair, tmp_path / "out")
    assert "[formats]: mllm has no index" in said
    assert "consolidated.safetensors" in said.partition("[formats]")[2]
    assert read_tensors(tmp_path / "out").keys() == expected.keys()
    assert "consolidated.safetensors" in manifest(tmp_path / "out")["left_out"]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["model-00001-of-00003.safetensors", "model-00003-of-00003.safetensors"], "lacks 1 of"),
        (["model.a.safetensors", "model.b.safetensors"], "several models"),
        (["a-1-of-1.safetensors", "b-1-of-1.safetensors"], "several models"),
    ],
)
def test_files_that_may_be_several_models_or_a_part_of_one_are_refused(
    files: list[str], message: str, tmp_path: Path
) -> None:
    pair = make_pair(tmp_path, layers=1)
    data = (pair.mllm / "model.safetensors").read_bytes()
    (pair.mllm / "model.safetensors").unlink()
    for file in files:
        (pair.mllm / file).write_bytes(data)
    refused(command("linear", pair, tmp_path / "out"), 5, message)


def test_a_tensor_in_two_shards_names_what_the_index_says_and_the_remedy_works(
    tmp_path: Path,
) -> None:
    pair = make_pair(tmp_path / "my models", layers=1, num_shards=2)
    index = json.loads((pair.mllm / "model.safetensors.index.json").read_text())["weight_map"]
    named, other = index[Q], next(f for f in index.values() if f != index[Q])
    tensors = c.read_shard(pair.mllm / other)
    c.write_shard(pair.mllm / other, tensors | {Q: store(np.zeros((HIDDEN, HIDDEN)))})
    arguments = command("linear", pair, tmp_path / "out")
    refused(arguments, 5, f"{Q} is in two shards", f"the index names {named}", "Keep both files")
    remedy = run(*arguments).stderr.partition("python -c")[2]
    env = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    subprocess.run(f"python -c{remedy}", shell=True, check=True, env=env)
    assert c.read_shard(pair.mllm / other) == tensors
    assert run(*arguments).code == 0
    assert (pair.mllm / f"{other}.bak").exists()
    assert f"{other}.bak" in manifest(tmp_path / "out")["left_out"]


def test_without_an_index_a_tensor_in_two_shards_lets_nothing_be_deleted(tmp_path: Path) -> None:
    pair = make_pair(tmp_path, layers=1, num_shards=2)
    (pair.mllm / "model.safetensors.index.json").unlink()
    first, second = sorted(pair.mllm.glob("*.safetensors"))
    twice = dict(list(c.read_shard(first).items())[:1])
    c.write_shard(second, c.read_shard(second) | twice)
    result = run(*command("linear", pair, tmp_path / "out"))
    assert_refusal(result, 5, ["is in two shards", "no index says which", "Keep both files"])


@pytest.mark.parametrize("limit", [256, pytest.param(64, marks=pytest.mark.slow)])
def test_more_shards_than_open_files_are_no_obstacle(limit: int, tmp_path: Path) -> None:
    """310 shards of the inputs, and as many of the output as it has tensors."""
    pair = make_pair(tmp_path, layers=13, num_shards=(150, 160))
    options = ["--max-shard-size", "1B", "-q"]
    arguments = [*command("linear", pair, tmp_path / "out"), *options]
    script = (
        "import resource, sys; from drift_merge.cli.merge import main; "
        f"resource.setrlimit(resource.RLIMIT_NOFILE, ({limit}, {limit})); "
        "sys.argv = ['drift-merge', *sys.argv[1:]]; main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments[1:]],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    assert run(*command("linear", pair, tmp_path / "expected"), "-q").code == 0
    assert read_tensors(tmp_path / "out") == read_tensors(tmp_path / "expected")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 150


def test_too_many_open_files_say_ulimit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = make_pair(tmp_path, layers=1)

    def fail(*_: Any, **__: Any) -> None:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr("drift_merge.storage.mapped.Descriptor", fail)
    refused(command("linear", pair, tmp_path / "out"), 5, "Too many open files", "ulimit -")


# Names of a wrapped model.


WRAPPERS = {
    "DDP": lambda name: f"module.{name}",
    "compile": lambda name: f"_orig_mod.{name}",
    "compiled layers": lambda name: name.replace("layers.0.", "layers.0._orig_mod."),
    "DDP of a compiled one": lambda name: f"module._orig_mod.{name}",
    "Lightning's strategy": lambda name: f"_forward_module.{name}",
    "FSDP": lambda name: f"_fsdp_wrapped_module.{name}".replace(
        "layers.0.", "layers.0._fsdp_wrapped_module._checkpoint_wrapped_module."
    ),
    "PEFT": lambda name: f"base_model.model.{name}",
    "Lightning's attribute": lambda name: f"model.{name}",
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("num_shards", [1, 2])
def test_a_wrapped_mllm_is_written_unwrapped_and_said_so(
    wrapper: str, num_shards: int, tmp_path: Path
) -> None:
    pair = make_pair(tmp_path, layers=1)
    succeed(pair, tmp_path / "expected")
    wrapped = {WRAPPERS[wrapper](name): t for name, t in read_tensors(pair.mllm).items()}
    mllm = c.write_checkpoint(
        tmp_path / "wrapped", wrapped, c.mllm_config(1), num_shards=num_shards
    )
    said = succeed(Pair(pair.reasoner, mllm), tmp_path / "out")
    assert read_tensors(tmp_path / "out") == read_tensors(tmp_path / "expected")
    assert "[wrapped]: " in said
    assert "names of wrapped come from a wrapped model" in said
    roles = ("--reasoner", str(pair.reasoner), "--mllm", str(mllm))
    assert run("drift-merge", "verify", str(tmp_path / "out"), *roles).code == 0


@pytest.mark.parametrize(
    ("change", "config"),
    [
        (lambda name: name, {}),
        (lambda name: name.replace("mlp.up_proj", "mlp.up_proj.base_layer"), {}),
        (lambda name: f"module.{name}" if "visual" in name else name, {}),
        (lambda name: f"model.{name}", {"auto_map": {"AutoModel": "m.M"}}),
    ],
    ids=["plain", "an adapter inside the model", "a part of that name", "remote code"],
)
def test_names_that_are_the_model_s_own_stay(change: Any, config: Any, tmp_path: Path) -> None:
    pair = make_pair(tmp_path, layers=1)
    tensors = {change(name): tensor for name, tensor in read_tensors(pair.mllm).items()}
    mllm = c.write_checkpoint(tmp_path / "own", tensors, c.mllm_config(1, **config))
    said = succeed(Pair(pair.reasoner, mllm), tmp_path / "out")
    assert read_tensors(tmp_path / "out").keys() == tensors.keys()
    assert "[wrapped]" not in said


def test_one_tensor_with_and_without_a_wrapper_is_refused(tmp_path: Path) -> None:
    pair = make_pair(tmp_path, layers=1, mllm={f"_orig_mod.{Q}": store([1.0])})
    refused(command("linear", pair, tmp_path / "out"), 5, f"holds {Q} twice", "_orig_mod.")


def test_a_peft_model_saved_whole_with_its_adapter_is_refused(tmp_path: Path) -> None:
    pair = make_pair(
        tmp_path, layers=1, mllm={Q.replace(".weight", ".lora_A.x.weight"): store([1.0])}
    )
    tensors = {f"base_model.model.{n}": t for n, t in read_tensors(pair.mllm).items()}
    mllm = c.write_checkpoint(tmp_path / "peft", tensors, c.mllm_config(1))
    refused(command("linear", Pair(pair.reasoner, mllm), tmp_path / "out"), 5, "unmerged", "merge_")


# What is no number.


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", "1e999"])
@pytest.mark.parametrize("key", ["rope_theta", "rms_norm_eps", "hidden_size", "routed_scale"])
@pytest.mark.parametrize("name", ["align", "linear", "compute"])
def test_a_config_with_a_number_that_is_none_is_carried_and_the_value_unknown(
    name: str, key: str, value: str, tmp_path: Path
) -> None:
    pair = make_pair(tmp_path, layers=1)
    config = c.mllm_config(1)
    config[key] = "HERE"
    text = json.dumps(config).replace('"HERE"', value)
    (pair.mllm / "config.json").write_text(text)
    arguments = command(name, pair, tmp_path / "out")
    for options in ([], ["--json"]) if name == "align" else (["--json"],):
        result = run(*arguments, *options)
        assert result.code == 0, result
        if options:
            json.loads(result.stdout, parse_constant=pytest.fail)
    if name == "linear":
        assert (tmp_path / "out/config.json").read_text() == text
        assert run("drift-merge", "verify", str(tmp_path / "out")).code == 0


def test_a_table_of_indices_in_the_tower_stays_the_mllm_s_and_is_counted(tmp_path: Path) -> None:
    table = "model.layers.0.mlp.gate.tid2eid"
    changes: Any = {table: store([[1, 2], [3, 0]], "I64")}
    other: Any = {table: store([[3, 3], [1, 1]], "I64")}
    pair = make_pair(tmp_path, layers=1, reasoner=other, mllm=changes)
    said = succeed(pair, tmp_path / "out")
    assert "[integers]: 1 selected tensors hold indices or masks, not weights, and stay" in said
    assert read_tensors(tmp_path / "out")[table] == changes[table]
    assert manifest(tmp_path / "out")["tensors"][table]["method"] == "copy"
    result = run(*command("compute", pair, tmp_path / "prior"))
    assert result.code == 0, result
    assert "[integers]" in result.stderr
    assert "layers.0.mlp.gate.tid2eid" not in read_tensors(tmp_path / "prior")


CODES = {
    "mxfp4": ("U8", {"quantization_config": {"quant_method": "mxfp4"}}),
    "fp8": ("F8_E4M3", {"quantization_config": {"quant_method": "fp8"}}),
    "bitsandbytes": ("I8", {"quantization_config": {"quant_method": "bitsandbytes"}}),
    "by its tensors": ("U8", {}),
}


@pytest.mark.parametrize("form", CODES)
def test_quantized_tensors_are_refused_where_selected_and_carried_where_copied(
    form: str, tmp_path: Path
) -> None:
    dtype, settings = CODES[form]
    up = "model.layers.0.mlp.up_proj.weight"
    codes = {
        name: Stored(dtype, (24, HIDDEN), bytes(24 * HIDDEN)) for name in (up, "visual.q.weight")
    }
    scales = {f"{up}_scale": store(np.ones(24)), "visual.q.weight_scale": store(np.ones(24))}
    changes: Any = codes | scales
    pair = make_pair(tmp_path, layers=1, mllm=changes, mllm_config_changes=settings)
    refused(command("linear", pair, tmp_path / "out"), 5, f"is quantized ({form})", up)
    succeed(pair, tmp_path / "attn", "--modules", "attn")
    found = read_tensors(tmp_path / "attn")
    assert {name: found[name] for name in changes} == changes
    assert found[Q] != read_tensors(pair.mllm)[Q]


@pytest.mark.parametrize("name", ["align", "compute", "linear"])
def test_a_name_that_is_no_directory_says_so_before_the_hub_is_asked(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = make_pair(tmp_path, layers=1)
    asked: list[str] = []

    def refuse(source: Any) -> Any:
        asked.append(sys.stderr.getvalue())  # type: ignore[attr-defined]
        raise SourceError("The Hub was asked.", remedy="Do not.")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("drift_merge.storage.hub.models.resolve_revision", refuse)
    result = run(*command(name, Pair(Path("resoner"), pair.mllm), tmp_path / "out"))
    assert_refusal(result, 3, ["The Hub was asked."])
    said = f"There is no directory {tmp_path / 'resoner'}: asking the Hub for resoner."
    assert asked == [f"Note [absent]: {said}\n"]
    quiet = run(*command(name, Pair(Path("org/resoner"), pair.mllm), tmp_path / "out"))
    assert_refusal(quiet, 3, ["The Hub was asked."])
    assert asked[1:] == [""]
