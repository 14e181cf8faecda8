"""The estimate against what published sizes give by hand, and what it offers instead."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from drift_merge.errors import RecipeError
from drift_merge.trainers.sft.memory import memory_of, require_memory
from drift_merge.trainers.sft.request import TrainingRequest
from drift_merge.trainers.sft.trained import trained_of

GB = 1e9
H, KV, WIDTH, LAYERS, VOCABULARY = 3584, 512, 18944, 28, 152064  # Qwen2.5-VL-7B
VISION = 676_550_144  # elements outside its language tower


def shapes():
    found = {
        "model.embed_tokens.weight": (VOCABULARY, H),
        "lm_head.weight": (VOCABULARY, H),
        "model.norm.weight": (H,),
        "visual.blocks.0.attn.qkv.weight": (VISION,),
    }
    for n in range(LAYERS):
        at = f"model.layers.{n}."
        for name, out in (("q", H), ("k", KV), ("v", KV)):
            found[f"{at}self_attn.{name}_proj.weight"] = (out, H)
            found[f"{at}self_attn.{name}_proj.bias"] = (out,)
        found[f"{at}self_attn.o_proj.weight"] = (H, H)
        for name in ("gate", "up"):
            found[f"{at}mlp.{name}_proj.weight"] = (WIDTH, H)
        found[f"{at}mlp.down_proj.weight"] = (H, WIDTH)
        found[f"{at}input_layernorm.weight"] = (H,)
        found[f"{at}post_attention_layernorm.weight"] = (H,)
    return found


CONFIG = {"model_type": "qwen2_5_vl", "hidden_size": H, "num_hidden_layers": LAYERS}
SEVEN = trained_of("7b", shapes(), CONFIG)
PLAIN = TrainingRequest("7b", Path("data.jsonl"), None)


def test_a_7b_by_hand():
    layer = 2 * H * H + 2 * H * KV + H + 2 * KV + 3 * H * WIDTH + 2 * H
    tower = LAYERS * layer + 2 * VOCABULARY * H + H
    assert SEVEN.tower == tower
    assert SEVEN.total == tower + VISION
    need = memory_of(PLAIN, SEVEN)
    assert need.weights == 4 * (tower + VISION)
    assert need.gradients == 4 * tower
    assert need.optimizer == 8 * tower
    assert 120 * GB < need.exact < 130 * GB  # 16 bytes a parameter that is trained


def test_lora_by_hand():
    rank = 16
    matrices = ((H, H), (KV, H), (KV, H), (H, H), (WIDTH, H), (WIDTH, H), (H, WIDTH))
    factors = LAYERS * sum(rank * (rows + columns) for rows, columns in matrices)
    need = memory_of(replace(PLAIN, lora=rank, precision="bf16"), SEVEN)
    assert SEVEN.factors(rank) == factors
    assert need.weights == 2 * SEVEN.total + 4 * factors
    assert need.gradients == 4 * factors
    assert need.total < 40 * GB


def test_sharding_divides_and_checkpointing_saves():
    eight = memory_of(replace(PLAIN, processes=8, fsdp=True), SEVEN)
    assert eight.exact == pytest.approx(memory_of(PLAIN, SEVEN).exact / 8, rel=1e-6)
    kept = memory_of(replace(PLAIN, gradient_checkpointing=False), SEVEN)
    assert kept.activations > 3 * memory_of(PLAIN, SEVEN).activations
    assert memory_of(replace(PLAIN, max_length=1024), SEVEN).activations == pytest.approx(
        memory_of(PLAIN, SEVEN).activations / 2
    )


@pytest.mark.parametrize(
    ("gigabytes", "offers"),
    [
        (110, ["--optimizer adamw_8bit", "--nproc-per-node 2", "--nproc-per-node 4"]),
        (48, ["--nproc-per-node 4", "--nproc-per-node 8", "--nproc-per-node 16"]),
        (1, ["Nothing of this size fits"]),
    ],
)
def test_what_would_fit_is_offered_and_does(gigabytes, offers):
    job = SimpleNamespace(request=PLAIN, trained=SEVEN)
    with pytest.raises(RecipeError, match="cannot fit") as raised:
        require_memory(job, int(gigabytes * GB))
    assert all(offer in raised.value.remedy for offer in offers), raised.value.remedy


def test_what_fits_is_let_through():
    require_memory(SimpleNamespace(request=PLAIN, trained=SEVEN), int(140 * GB))
    require_memory(SimpleNamespace(request=PLAIN, trained=SEVEN), None)
    lora = replace(PLAIN, lora=16, precision="bf16")
    require_memory(SimpleNamespace(request=lora, trained=SEVEN), int(40 * GB))
