"""Layers of towers whose names are not llama's, as real checkpoints store them: tail -> shape."""

H, I, E = 32, 48, 4  # noqa: E741

OPT = {
    **{f"self_attn.{p}_proj.weight": (H, H) for p in ("q", "k", "v", "out")},
    "self_attn_layer_norm.weight": (H,),
    "fc1.weight": (I, H),
    "fc1.bias": (I,),
    "fc2.weight": (H, I),
    "fc2.bias": (H,),
    "final_layer_norm.weight": (H,),
}
BERT = {
    **{f"attention.self.{p}.weight": (H, H) for p in ("query", "key", "value")},
    "attention.output.dense.weight": (H, H),
    "attention.output.LayerNorm.weight": (H,),
    "intermediate.dense.weight": (I, H),
    "output.dense.weight": (H, I),
    "output.LayerNorm.bias": (H,),
}
MAMBA_BLOCK = {
    "norm.weight": (H,),
    "mixer.A_log": (4,),
    "mixer.D": (4,),
    "mixer.dt_bias": (4,),
    "mixer.conv1d.weight": (64, 1, 4),
    "mixer.in_proj.weight": (100, H),
    "mixer.norm.weight": (64,),
    "mixer.out_proj.weight": (H, 64),
}
MLP_BLOCK = {"norm.weight": (H,), "mixer.up_proj.weight": (I, H), "mixer.down_proj.weight": (H, I)}
ATTENTION_BLOCK = {
    "norm.weight": (H,),
    **{f"mixer.{p}_proj.weight": (H, H) for p in ("q", "k", "v", "o")},
}
MOE_BLOCK = {
    "norm.weight": (H,),
    "mixer.gate.weight": (E, H),
    "mixer.shared_experts.up_proj.weight": (I, H),
    **{f"mixer.experts.{e}.up_proj.weight": (I, H) for e in range(E)},
}
GEMMA_3N = {
    "self_attn.q_proj.weight": (H, H),
    "mlp.up_proj.weight": (I, H),
    "altup.modality_router.weight": (4, H),
    "laurel.linear_left.weight": (8, H),
    "laurel.linear_right.weight": (H, 8),
    "per_layer_input_gate.weight": (6, H),
    "per_layer_projection.weight": (H, 6),
}
