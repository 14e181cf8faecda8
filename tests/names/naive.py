"""Fused, stacked and interleaved storage of split tensors, constructed naively in numpy."""

import numpy as np

from tests.names import families as f

META = {  # what Meta's own code calls the parts of a Llama
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "embed_tokens": "tok_embeddings",
}


def naive_fused(split):
    """What Phi would store for the layers of `split` (name -> array)."""
    out = dict(split)
    for name in list(split):
        if name.endswith("q_proj.weight") or name.endswith("q_proj.bias"):
            names = [name.replace("q_proj", f"{p}_proj") for p in "qkv"]
            out[name.replace("q_proj", "qkv_proj")] = np.concatenate([out.pop(n) for n in names])
        if name.endswith("gate_proj.weight") and "experts" not in name:
            names = [name, name.replace("gate", "up")]
            out[name.replace("gate_proj", "gate_up_proj")] = np.concatenate(
                [out.pop(n) for n in names]
            )
    return out


def naive_experts(split, *, transposed):
    """What Qwen3-VL-MoE would store for the per-expert layers of `split`."""
    out = {n: v for n, v in split.items() if ".experts." not in n}
    prefixes = sorted({n.split(".experts.")[0] for n in split if ".experts." in n})
    for prefix in prefixes:
        num = sum(n.startswith(prefix) and n.endswith("down_proj.weight") for n in split)
        get = lambda e, p: split[f"{prefix}.experts.{e}.{p}_proj.weight"]  # noqa: B023, E731
        gate_up = np.stack([np.concatenate([get(e, "gate"), get(e, "up")]) for e in range(num)])
        down = np.stack([get(e, "down") for e in range(num)])
        axes = (0, 2, 1) if transposed else (0, 1, 2)
        out[f"{prefix}.experts.gate_up_proj"] = gate_up.transpose(axes)
        out[f"{prefix}.experts.down_proj"] = down.transpose(axes)
    return out


def naive_internlm(split):
    """InternLM2's tensors for a llama-like decoder without biases."""
    renames = META | {"lm_head": "output"}
    out = {}
    for name, value in split.items():
        if "q_proj" in name:
            q, k, v = (split[name.replace("q_proj", f"{p}_proj")] for p in "qkv")
            rows = [x.reshape(f.KV, -1, f.DIM, f.H) for x in (q, k, v)]
            whole = np.concatenate(rows, axis=1).reshape(-1, f.H)
            out[name.replace("self_attn.q_proj", "attention.wqkv")] = whole
        elif "k_proj" not in name and "v_proj" not in name:
            for old, new in renames.items():
                name = name.replace(old, new)
            out[name] = value
    return out
