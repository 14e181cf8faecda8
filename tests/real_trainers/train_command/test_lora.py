"""`drift-prior train --lora`: PEFT's folder, the update by hand, eight bits, other options."""

import json

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("peft")
pytest.importorskip("PIL")

from tests import checkpoints as c
from tests.real_trainers.train_command.commands import command, run

pytestmark = [
    pytest.mark.engines,
    pytest.mark.filterwarnings("default"),
    pytest.mark.timeout(600),
]


@pytest.fixture(scope="module")
def adapter(setup, tmp_path_factory):
    out = tmp_path_factory.mktemp("lora") / "out"
    run(command(setup, out, "--lora", "4", "-q"))
    return out


def test_the_adapter_loads_in_peft_and_acts(setup, adapter):
    from peft import PeftModel

    base = setup.model()
    before = {name: p.detach().clone() for name, p in base.named_parameters()}
    model = PeftModel.from_pretrained(base, adapter)
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (4, 8)
    assert config["base_model_name_or_path"] == str(setup.mllm)
    stored = c.read_tensors(adapter)
    live = {n: p for n, p in model.named_parameters() if "lora_" in n}
    assert len(stored) == len(live) == 2 * 2 * 7  # A and B, 2 layers, 7 matrices
    for name, parameter in live.items():
        path = adapter / "adapter_model.safetensors"
        from safetensors.torch import load_file

        assert torch.equal(load_file(path)[name.replace(".default", "")], parameter)
    merged = dict(model.merge_and_unload().named_parameters())
    moved = {name for name, value in merged.items() if not torch.equal(value, before[name])}
    assert len(moved) == 2 * 7
    assert all("language_model.layers" in name for name in moved)
    manifest = json.loads((adapter / "train.json").read_text())
    assert manifest["report"]["steps"] == 8
    assert manifest["change_kept"] is None


def test_the_prior_pulls_the_factors_towards_the_reasoner(setup, adapter, tmp_path):
    from peft import PeftModel

    plain = tmp_path / "plain"
    run(command(setup, plain, "--lora", "4", "-q", prior=False))

    def distance(folder):
        """How far along delta the merged weights have gone, over all biased tensors."""
        base = setup.model()
        before = {name: p.detach().clone() for name, p in base.named_parameters()}
        merged = PeftModel.from_pretrained(base, folder).merge_and_unload()
        after = dict(merged.named_parameters())
        along = sum(float(((after[n] - before[n]) * d).sum()) for n, d in setup.deltas.items())
        return along / sum(float(d.square().sum()) for d in setup.deltas.values())

    assert distance(adapter) > distance(plain) + 1e-3


def test_eight_bits_and_bf16_and_no_checkpointing_and_workers(setup, tmp_path):
    pytest.importorskip("bitsandbytes")
    out = tmp_path / "out"
    more = ("--optimizer", "adamw_8bit", "--precision", "bf16", "--no-gradient-checkpointing")
    done = run(command(setup, out, *more, "--workers", "2", "--steps", "2", "--json"))
    told = json.loads(done.stdout)
    assert told["num_steps"] == 2
    assert told["plan"]["optimizer"] == "adamw_8bit"


def test_checkpointing_and_workers_change_no_byte_of_the_weights(setup, adapter, tmp_path):
    out = tmp_path / "out"
    run(command(setup, out, "--lora", "4", "-q", "--no-gradient-checkpointing", "--workers", "2"))
    name = "adapter_model.safetensors"
    assert (out / name).read_bytes() == (adapter / name).read_bytes()


def test_max_length_is_told_and_refused_before_the_first_step(setup, tmp_path):
    data = setup.mllm.parent / "long.jsonl"
    rows = [
        json.loads(line) for line in (setup.mllm.parent / "data.jsonl").read_text().split("\n")[:4]
    ]
    rows[2]["answer"] = "red " * 30
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = command(setup, tmp_path / "out", "--data", str(data), "--steps", "1")
    done = run([*words, "--max-length", "24"])
    assert "1 of 4 examples have 24 tokens or more" in done.stderr
    refused = run([*words[:-2], "-o", str(tmp_path / "two"), "--max-length", "5"], code=2)
    assert "line 1" in refused.stderr
    assert "would cut" in refused.stderr
    assert not (tmp_path / "two").exists()


def test_conversations_of_every_kind_are_trained_together(setup, tmp_path):
    said = {"role": "assistant", "content": "a circle"}
    rows = [
        {"image": "1.png", "question": "what color is it", "answer": "red"},
        {"question": "what color is red", "answer": "red"},
        {
            "images": ["1.png", "2.png"],
            "conversations": [
                {"from": "human", "value": "<image>\n<image>\nwhat shape is it"},
                {"from": "gpt", "value": "a circle"},
                {"from": "human", "value": "what color"},
                {"from": "gpt", "value": "blue"},
            ],
        },
        {"messages": [{"role": "user", "content": "is it red"}, said], "images": ["3.png"]},
    ]
    data = setup.mllm.parent / "mixed.json"
    data.write_text(json.dumps(rows))
    out = tmp_path / "out"
    done = run(
        command(setup, out, "--data", str(data), "--steps", "2", "--batch-size", "4", "--json")
    )
    plan = json.loads(done.stdout)["plan"]
    assert (plan["learned_turns"], plan["text_only"], plan["num_images"]) == (5, 1, 4)


def test_a_broken_picture_is_named_before_the_model_is_loaded(setup, tmp_path):
    whole = (setup.mllm.parent / "1.png").read_bytes()
    (setup.mllm.parent / "broken.png").write_bytes(whole[: len(whole) // 2])
    data = setup.mllm.parent / "broken.jsonl"
    row = {"image": "broken.png", "question": "what", "answer": "red"}
    data.write_text("\n" + json.dumps(row))
    failed = run(command(setup, tmp_path / "out", "--data", str(data)), code=3)
    assert "broken.jsonl, line 2" in failed.stderr
    assert "cannot be opened" in failed.stderr
