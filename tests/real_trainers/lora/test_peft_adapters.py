"""Adapters as reasoners against PEFT itself: its own merge, or a refusal that names the field.

Every field of the installed `LoraConfig` has values here, so a field that a later PEFT adds
fails the first test until somebody says what it does.
"""

import copy
import dataclasses
import json
import subprocess
import sys

import pytest
import torch

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from safetensors.torch import load_file, save_file  # noqa: E402

from drift_merge.engine.job import RunOptions  # noqa: E402
from drift_merge.errors import CheckpointError  # noqa: E402
from drift_merge.merges.make import make_merge  # noqa: E402
from drift_merge.plans.prepare import prepare  # noqa: E402
from drift_merge.recipes.recipe import Recipe  # noqa: E402
from tests.real_trainers import tiny  # noqa: E402
from tests.real_trainers.lora.adapter_fields import (  # noqa: E402
    LINEAR,
    REFUSED_MADE,
    REFUSED_WRITTEN,
    TAKEN,
    WRITTEN,
)

pytestmark = [pytest.mark.engines, pytest.mark.filterwarnings("default")]


RANK, ALPHA = 4, 6


def gpt2():
    config = transformers.GPT2Config(
        vocab_size=96, n_embd=32, n_layer=2, n_head=4, n_positions=64, tie_word_embeddings=True
    )
    return transformers.GPT2LMHeadModel(config)


MODELS = {
    "qwen2": (tiny.FAMILIES["qwen2_5_vl"].text, LINEAR),
    "gpt2": (gpt2, ["c_attn", "c_proj", "c_fc"]),
    "llava": (tiny.FAMILIES["llava"].mllm, LINEAR),
    "qwen2_5_vl": (tiny.FAMILIES["qwen2_5_vl"].mllm, [*LINEAR, "qkv"]),
    "smolvlm": (tiny.FAMILIES["smolvlm"].mllm, LINEAR),
}


MLLMS = ("llava", "qwen2_5_vl", "smolvlm")


def cases(table):
    return [
        pytest.param(field, values, id=f"{field}-{number}")
        for field, found in table.items()
        for number, values in enumerate(found)
    ]


@pytest.fixture(scope="session")
def bases(tmp_path_factory):
    """Every base, saved once in float32."""
    directory = tmp_path_factory.mktemp("bases")
    for name, (make, _) in MODELS.items():
        torch.manual_seed(3)
        make().save_pretrained(directory / name)
    return directory


def load(bases, kind):
    return MODELS[kind][0]().__class__.from_pretrained(bases / kind, dtype=torch.float32)


def train(bases, kind, out, **values):
    """An adapter whose tensors have all moved, saved by PEFT; the largest |W| + s |B| |A|."""
    torch.manual_seed(5)
    settings = {"r": RANK, "lora_alpha": ALPHA, "target_modules": MODELS[kind][1]} | values
    model = peft.get_peft_model(load(bases, kind), peft.LoraConfig(**settings))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(out)
    return model


def rewrite(adapter, **values):
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def merged_by_peft(bases, kind, adapter, out):
    """PEFT's merge of an adapter as it is saved, under the names of the disk."""
    model = peft.PeftModel.from_pretrained(load(bases, kind), adapter)
    model.merge_and_unload().save_pretrained(out)
    return load_file(out / "model.safetensors")


def mllm_around(bases, kind, directory):
    """An MLLM with the base as its tower: what a text adapter is merged into."""
    if kind in MLLMS:
        return bases / kind
    tensors = {
        f"language_model.{n}": t for n, t in load_file(bases / kind / "model.safetensors").items()
    }
    directory.mkdir()
    tensors["vision_tower.x.weight"] = torch.ones(4, 4)
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    text = json.loads((bases / kind / "config.json").read_text())
    config = {"model_type": "llava", "text_config": text, "vision_config": {"hidden_size": 4}}
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def merged_by_us(bases, kind, adapter, directory, **recipe):
    mllm = mllm_around(bases, kind, directory / "mllm")
    request = Recipe(
        method="passthrough",
        reasoners=(str(adapter),),
        mllm=str(mllm),
        modules="attn,mlp,norm",
        **recipe,
    )
    prepared = prepare(request)
    make_merge(prepared, prepared.plan(), directory / "ours", RunOptions(threads=1))
    found = load_file(directory / "ours/model.safetensors")
    return {
        name.removeprefix("language_model.") if kind not in MLLMS else name: tensor
        for name, tensor in found.items()
    }


def assert_same(bases, kind, adapter, directory, *, at_least=1):
    """The tower is PEFT's merge, everything else the mllm's, and the merge is not the base."""
    theirs = merged_by_peft(bases, kind, adapter, directory / "theirs")
    ours = merged_by_us(bases, kind, adapter, directory)
    before = load_file(bases / kind / "model.safetensors")
    changed = 0
    for name, expected in theirs.items():
        if "layers." not in name and ".h." not in name:
            continue
        if kind in MLLMS and "vision" in name:
            assert torch.equal(ours[name], before[name])
            continue
        # Sums of `rank` products, and under DoRA of a row of squares, each rounded, on both sides;
        # no partial sum is above |W| + s |B| |A|, which these sizes keep below 16.
        limit = 2 * (16 + expected.shape[-1]) * 2.0**-24 * 16
        assert ours[name].shape == expected.shape
        assert (ours[name] - expected).abs().max().item() <= limit, name
        changed += not torch.allclose(expected, before[name], atol=100 * limit)
    assert changed >= at_least


def test_every_field_of_the_installed_peft_has_a_case():
    fields = {field.name for field in dataclasses.fields(peft.LoraConfig)}
    covered = {*TAKEN, *WRITTEN, *REFUSED_MADE, *REFUSED_WRITTEN}
    assert not fields - covered


@pytest.mark.parametrize(("field", "values"), cases(TAKEN))
def test_a_field_that_is_taken_gives_what_peft_merges(bases, tmp_path, field, values):
    train(bases, "qwen2", tmp_path / "adapter", **values)
    assert_same(bases, "qwen2", tmp_path / "adapter", tmp_path)


@pytest.mark.parametrize("field", WRITTEN)
def test_a_field_without_effect_may_say_anything(bases, tmp_path, field):
    train(bases, "qwen2", tmp_path / "adapter")
    if WRITTEN[field] is not None:
        rewrite(tmp_path / "adapter", **{field: WRITTEN[field]})
    assert_same(bases, "qwen2", tmp_path / "adapter", tmp_path, at_least=14)


@pytest.mark.parametrize(("field", "values"), cases(REFUSED_MADE))
def test_what_peft_makes_otherwise_is_refused_by_the_field(bases, tmp_path, field, values):
    train(bases, "qwen2", tmp_path / "adapter", **values)
    with pytest.raises(CheckpointError, match=rf"has {field}: .* in adapter_config\.json"):
        merged_by_us(bases, "qwen2", tmp_path / "adapter", tmp_path)


@pytest.mark.parametrize(("field", "value"), cases(REFUSED_WRITTEN))
def test_what_is_written_is_refused_by_the_field(bases, tmp_path, field, value):
    train(bases, "qwen2", tmp_path / "adapter")
    rewrite(tmp_path / "adapter", **{field: value})
    with pytest.raises(CheckpointError, match=rf"has {field}: .* in adapter_config\.json"):
        merged_by_us(bases, "qwen2", tmp_path / "adapter", tmp_path)


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"fan_in_fan_out": True},
        {"use_rslora": True, "rank_pattern": {"c_attn": 2}},
        {"target_modules": ["attn.c_proj"]},  # square: only the class says that it is transposed
        {"target_modules": ["c_fc"], "layers_to_transform": [1]},
    ],
)
def test_weights_that_are_stored_transposed(bases, tmp_path, values):
    train(bases, "gpt2", tmp_path / "adapter", **values)
    assert_same(bases, "gpt2", tmp_path / "adapter", tmp_path)


@pytest.mark.parametrize("flag", [False, True])
def test_gpt2_is_transposed_whatever_the_field_says(bases, tmp_path, flag):
    train(bases, "gpt2", tmp_path / "adapter")
    rewrite(tmp_path / "adapter", fan_in_fan_out=flag)
    assert_same(bases, "gpt2", tmp_path / "adapter", tmp_path, at_least=8)


def test_dora_on_transposed_weights_is_refused_by_the_field(bases, tmp_path):
    train(bases, "gpt2", tmp_path / "adapter", use_dora=True)
    with pytest.raises(CheckpointError, match="use_dora"):
        merged_by_us(bases, "gpt2", tmp_path / "adapter", tmp_path)


@pytest.mark.parametrize("kind", MLLMS)
@pytest.mark.parametrize(
    "values",
    [
        {},
        {"use_dora": True, "target_modules": ["q_proj", "up_proj"]},
        {"alpha_pattern": {"language_model.*.q_proj|text_model.*.q_proj": 30}},
        {"target_modules": r".*(language_model|text_model)\.layers.*proj"},
        {"exclude_modules": r".*(vision|visual).*"},
        {"modules_to_save": ["input_layernorm"]},
    ],
)
def test_an_adapter_trained_on_the_mllm_is_the_mllm_fine_tuned(bases, tmp_path, kind, values):
    train(bases, kind, tmp_path / "adapter", **values)
    assert_same(bases, kind, tmp_path / "adapter", tmp_path)


@pytest.mark.parametrize(("kind", "count"), [("llava", 3), ("smolvlm", 3), ("qwen2_5_vl", 4)])
def test_factors_of_the_vision_tower_are_counted(bases, tmp_path, kind, count):
    train(bases, kind, tmp_path / "adapter")
    recipe = Recipe(
        method="passthrough", reasoners=(str(tmp_path / "adapter"),), mllm=str(bases / kind)
    )
    prepared = prepare(recipe)
    (note,) = [f.message for f in prepared.findings if f.code == "adapter"]
    stored = load_file(tmp_path / "adapter/adapter_model.safetensors")
    outside = {n for n in stored if "vis" in n}
    assert f"adapts {len(outside) // 2:,} modules outside the language tower" in note
    ((_, alignment),) = prepared.reasoners
    found = {n for r in alignment.records if r.status == "outside_tower" for n in r.reasoner}
    assert outside <= found
    assert not {n for n in found if "lora_" in n} - outside
    assert len(outside) // 2 == count


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_a_start_that_was_converted_is_plain_lora(bases, tmp_path, start):
    model = train(bases, "qwen2", tmp_path / "unused")
    del model
    torch.manual_seed(5)
    config = peft.LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules=LINEAR, init_lora_weights=start
    )
    model = peft.get_peft_model(load(bases, "qwen2"), config)
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "initial")
    model.peft_config["default"].init_lora_weights = start
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(0.2 * torch.randn_like(parameter))
    adapter = tmp_path / "adapter"
    model.save_pretrained(adapter, path_initial_model_for_weight_conversion=tmp_path / "initial")
    rewrite(adapter, base_model_name_or_path=str(bases / "qwen2"))
    assert_same(bases, "qwen2", adapter, tmp_path, at_least=14)


@pytest.mark.parametrize("start", ["pissa", "olora", "eva", "pissa_niter_4"])
def test_the_printed_remedy_gives_the_weights_that_were_trained(bases, tmp_path, start):
    written = start == "eva"  # whose start needs data, and leaves the base as it is
    model = train(
        bases, "qwen2", tmp_path / "adapter", init_lora_weights=True if written else start
    )
    if written:
        rewrite(tmp_path / "adapter", init_lora_weights=start)
    with pytest.raises(CheckpointError) as refused:
        merged_by_us(bases, "qwen2", tmp_path / "adapter", tmp_path)
    command = refused.value.remedy.split("\n")[-1]
    trained = copy.deepcopy(model).merge_and_unload().state_dict()
    if start == "pissa_niter_4":  # found by chance, so only the model in memory has it
        exec(command.replace("MERGED", str(tmp_path / "MERGED")), {"model": model})
    else:
        command = command.replace("python", sys.executable, 1)
        done = subprocess.run(
            command, shell=True, cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
    for name, tensor in load_file(tmp_path / "MERGED/model.safetensors").items():
        assert torch.allclose(tensor, trained[name], atol=1e-4), name


def test_a_fresh_checkpoint_of_an_adapter_that_peft_gives_another_name(bases, tmp_path):
    """Saved through the state dict, factors keep the adapter's name, as PEFT can load them."""
    train(bases, "qwen2", tmp_path / "adapter")
    path = tmp_path / "adapter/adapter_model.safetensors"
    tensors = load_file(path)
    named = {n.replace(".weight", ".default.weight"): t for n, t in tensors.items()}
    save_file(named, path, {"format": "pt"})
    assert_same(bases, "qwen2", tmp_path / "adapter", tmp_path, at_least=14)
