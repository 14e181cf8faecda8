"""A LoRA adapter of one tensor, as PEFT stores it."""

import json

import numpy as np

from tests import checkpoints as c

NAME = "model.layers.0.self_attn.o_proj.weight"
RANK = 2


def write_adapter(path, base, *, factors=None, **config):
    """A PEFT directory that adapts one tensor of a base; returns scale * B @ A in float64."""
    path.mkdir()
    rows, cols = c.read_tensors(base)[NAME].values.shape
    generator = np.random.default_rng(7)
    a = c.store(generator.normal(size=(RANK, cols)).astype(np.float32), "F32")
    b = c.store(generator.normal(size=(rows, RANK)).astype(np.float32), "F32")
    prefix = "base_model.model." + NAME.removesuffix(".weight")
    tensors = factors or {f"{prefix}.lora_A.weight": a, f"{prefix}.lora_B.weight": b}
    c.write_shard(path / "adapter_model.safetensors", tensors)
    settings = {"peft_type": "LORA", "lora_alpha": 6, "r": RANK} | config
    settings["base_model_name_or_path"] = str(base)
    (path / "adapter_config.json").write_text(json.dumps(settings))
    return b.values.astype(np.float64) @ a.values.astype(np.float64)
