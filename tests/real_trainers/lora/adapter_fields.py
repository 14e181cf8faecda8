"""What PEFT can be asked for: taken, without effect, or refused by its name."""

import pytest

peft = pytest.importorskip("peft")


LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


# What PEFT can be asked for and this tool takes, by the field that a case is about.
TAKEN = {
    "r": [{"r": 1}, {"r": 16}],
    "lora_alpha": [{"lora_alpha": 1}, {"lora_alpha": 64}],
    "target_modules": [
        {"target_modules": ["q_proj"]},
        {"target_modules": ["self_attn.q_proj", "model.layers.1.mlp.up_proj"]},
        {"target_modules": r".*\.layers\.1\..*\.(q|up)_proj"},
        {"target_modules": "all-linear"},
    ],
    "exclude_modules": [
        {"exclude_modules": ["layers.0.self_attn.q_proj", "up_proj"]},
        {"exclude_modules": r".*layers\.1\..*"},
    ],
    "lora_dropout": [{"lora_dropout": 0.5}],
    "fan_in_fan_out": [{"fan_in_fan_out": True}],
    "use_rslora": [{"use_rslora": True}],
    "modules_to_save": [{"modules_to_save": ["norm"]}, {"modules_to_save": ["down_proj"]}],
    "init_lora_weights": [
        {"init_lora_weights": value} for value in (False, "gaussian", "orthogonal", "mica")
    ],
    "layers_to_transform": [{"layers_to_transform": 1}, {"layers_to_transform": [0]}],
    "layers_pattern": [
        {"layers_to_transform": [1], "layers_pattern": "layers"},
        {"layers_to_transform": [1], "layers_pattern": ["h", "layers"]},
    ],
    "rank_pattern": [
        {"rank_pattern": {"v_proj": 8, "layers.1.mlp.*": 2}},
        {"rank_pattern": {"q_proj|k_proj": 3, "self_attn.q_proj": 5}, "use_rslora": True},
    ],
    "alpha_pattern": [
        {"alpha_pattern": {"q_proj|k_proj": 64}},
        {"alpha_pattern": {"layers.0.self_attn.q_proj": 64, "q_proj": 16}},
        {"alpha_pattern": {"q_proj": 16, "layers.0.self_attn.q_proj": 64}},
        {"alpha_pattern": {"^model.layers.0.self_attn.q_proj": 64, "mlp.*proj": 2}},
        {"alpha_pattern": {"^q_proj": 64, "o_proj$": 3, "_proj": 99, "up_pro": 77}},
    ],
    "use_dora": [{"use_dora": True}, {"use_dora": True, "use_rslora": True}],
    "qalora_group_size": [{"qalora_group_size": 8}],
    "megatron_core": [{"megatron_core": "megatron.other"}],
    "task_type": [{"task_type": "CAUSAL_LM"}],
    "inference_mode": [{"inference_mode": True}],
    "loftq_config": [{"loftq_config": {"loftq_bits": 4}}],
    "eva_config": [{"eva_config": peft.EvaConfig()}],
    "corda_config": [{"corda_config": peft.tuners.lora.config.CordaConfig()}],
    "lora_ga_config": [{"lora_ga_config": peft.LoraGAConfig()}],
    "runtime_config": [{"runtime_config": peft.LoraRuntimeConfig(ephemeral_gpu_offload=True)}],
}


# What is written into adapter_config.json by hand, and has no effect in PEFT either.
WRITTEN = {
    "auto_mapping": {"base_model_class": "X", "parent_library": "y"},
    "peft_version": "0.4.0",
    "revision": "main",
    "base_model_name_or_path": None,  # what every case changes
}


# What is refused by its name: made by PEFT where it needs no data, else written by hand.
REFUSED_MADE = {
    "init_lora_weights": [{"init_lora_weights": v} for v in ("pissa", "pissa_niter_4", "olora")],
    "bias": [{"bias": "all"}, {"bias": "lora_only"}],
    "trainable_token_indices": [{"trainable_token_indices": [1, 2]}],
    "use_qalora": [{"use_qalora": True, "qalora_group_size": 2}],
    "layer_replication": [{"layer_replication": [[0, 2], [0, 2]]}],
    "lora_bias": [{"lora_bias": True, "target_modules": ["q_proj"]}],
    "kasa_config": [{"kasa_config": peft.tuners.lora.config.KasaConfig()}],
    "velora_config": [{"velora_config": peft.tuners.lora.config.VeloraConfig(num_groups=2)}],
    "ensure_weight_tying": [{"ensure_weight_tying": True}],
}


REFUSED_WRITTEN = {
    "peft_type": [kind.value for kind in peft.PeftType if kind.value != "LORA"] + [None],
    "init_lora_weights": ["eva", "corda", "loftq", "lora_ga", "something new", None],
    "megatron_config": [{"hidden_size": 32}],
    "alora_invocation_tokens": [[1, 2]],
    "monteclora_config": [{"num_samples": 8}],
    "target_parameters": [["mlp.experts.gate_up_proj"]],
    "use_bdlora": [{"nblocks": 2}],
    "arrow_config": [{"top_k": 3}],
    "a_field_of_tomorrow": [True, 1, "on", [0], {"a": 1}],
}
