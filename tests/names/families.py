"""Name lists for tests: golden files and small synthetic families."""

import json
import re
from pathlib import Path

from drift_merge.names.tensors import Model

GOLDEN = Path(__file__).parents[1] / "golden" / "names"
H, WIDTH, HEADS, KV, DIM, VOCAB = 8, 12, 4, 2, 2, 20  # hidden, mlp, heads, kv heads, head size


def golden(name, *, in_memory=False):
    """A golden list as a Model; shapes are known for the tiny ones on disk alone."""
    data = json.loads((GOLDEN / f"{name}.json").read_text())
    shapes = {} if in_memory else data.get("shapes", {})
    names = data["in_memory_names" if in_memory else "names"]
    known = {n: tuple(shapes[n]) if n in shapes else None for n in names}
    return Model(name, known, data.get("config", {}))


def deepseek():
    """The GGUF header of DeepSeek-R1-Distill-Qwen-7B in Hugging Face names."""
    data = json.loads((GOLDEN / "gguf_deepseek_r1_distill_qwen_7b_header.json").read_text())
    words = {
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "attn_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    }
    top = {"output": "lm_head", "output_norm": "model.norm", "token_embd": "model.embed_tokens"}
    shapes = {}
    for name, shape in data["shapes"].items():
        found = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
        if found:
            new = f"model.layers.{found[1]}.{words[found[2]]}.{found[3]}"
        else:
            new = f"{top[name.removesuffix('.weight')]}.weight"
        shapes[new] = tuple(shape)
    config = {
        "model_type": "qwen2",
        "hidden_size": data["config"]["qwen2.embedding_length"],
        "num_hidden_layers": data["config"]["qwen2.block_count"],
        "num_attention_heads": data["config"]["qwen2.attention.head_count"],
        "num_key_value_heads": data["config"]["qwen2.attention.head_count_kv"],
        "intermediate_size": data["config"]["qwen2.feed_forward_length"],
        "rope_theta": data["config"]["qwen2.rope.freq_base"],
        "vocab_size": data["config"]["vocab"],
        "tie_word_embeddings": False,
    }
    return Model("deepseek-ai/DeepSeek-R1-Distill-Qwen-7B", shapes, config)


def layer(*, bias=True, qk_norm=False, hidden=H):
    """Tail -> shape of one llama-like layer."""
    q, kv = HEADS * DIM, KV * DIM
    tails = {
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
        "self_attn.q_proj.weight": (q, hidden),
        "self_attn.k_proj.weight": (kv, hidden),
        "self_attn.v_proj.weight": (kv, hidden),
        "self_attn.o_proj.weight": (hidden, q),
        "mlp.gate_proj.weight": (WIDTH, hidden),
        "mlp.up_proj.weight": (WIDTH, hidden),
        "mlp.down_proj.weight": (hidden, WIDTH),
    }
    if bias:
        tails |= {f"self_attn.{p}_proj.bias": (q if p == "q" else kv,) for p in "qkv"}
    if qk_norm:
        tails |= {f"self_attn.{p}_norm.weight": (DIM,) for p in "qk"}
    return tails


def decoder(prefix="model.", head="lm_head.", *, layers=3, tails=None, hidden=H, vocab=VOCAB):
    """Name -> shape of a whole decoder under `prefix`; no head if `head` is None."""
    shapes = {
        f"{prefix}embed_tokens.weight": (vocab, hidden),
        f"{prefix}norm.weight": (hidden,),
    }
    for number in range(layers):
        for tail, shape in (tails or layer(hidden=hidden)).items():
            shapes[f"{prefix}layers.{number}.{tail}"] = shape
    if head is not None:
        shapes[f"{head}weight"] = (vocab, hidden)
    return shapes


VISION = {
    "vision_tower.vision_model.encoder.layers.0.self_attn.q_proj.weight": (6, 6),
    "vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight": (6, 6),
    "vision_tower.vision_model.embeddings.patch_embedding.weight": (6, 3, 2, 2),
    "connector.perceiver.layers.0.self_attn.q_proj.weight": (6, 6),
    "multi_modal_projector.linear_1.weight": (8, 6),
}

TEXT = Model("text", decoder())


def mllm(prefix="language_model.model.", head="language_model.lm_head.", *, config=None, **kw):
    return Model("mllm", {**decoder(prefix, head, **kw), **VISION}, config or {})


def fuse_tails(tails):
    """The same layer as Phi stores it: q, k, v in one tensor, gate and up in another."""
    tails = dict(tails)
    for leaf in ("weight", "bias"):
        for whole, parts in (
            ("self_attn.qkv_proj", [f"self_attn.{p}_proj" for p in "qkv"]),
            ("mlp.gate_up_proj", ["mlp.gate_proj", "mlp.up_proj"]),
        ):
            shapes = [tails.pop(f"{p}.{leaf}") for p in parts if f"{p}.{leaf}" in tails]
            if shapes:
                tails[f"{whole}.{leaf}"] = (sum(s[0] for s in shapes), *shapes[0][1:])
    return tails


def experts(num=3, *, hidden=H, width=5):
    """A Qwen3-MoE layer: one tensor an expert."""
    tails = {k: v for k, v in layer(bias=False, hidden=hidden).items() if "mlp" not in k}
    tails["mlp.gate.weight"] = (num, hidden)
    for e in range(num):
        for part in ("gate", "up", "down"):
            shape = (hidden, width) if part == "down" else (width, hidden)
            tails[f"mlp.experts.{e}.{part}_proj.weight"] = shape
    return tails


def fused_experts(num=3, *, hidden=H, width=5, transposed=False):
    """The same layer with all experts in one tensor, as Qwen3-VL-MoE stores it."""
    tails = {
        k: v for k, v in experts(num, hidden=hidden, width=width).items() if ".experts." not in k
    }
    gate_up, down = (num, 2 * width, hidden), (num, hidden, width)
    if transposed:
        gate_up, down = (num, hidden, 2 * width), (num, width, hidden)
    return {**tails, "mlp.experts.gate_up_proj": gate_up, "mlp.experts.down_proj": down}


def internlm(layers=3):
    """InternLM2's names, with q, k and v interleaved by key-value group in wqkv."""
    tails = {
        "attention_norm.weight": (H,),
        "ffn_norm.weight": (H,),
        "attention.wqkv.weight": ((HEADS + 2 * KV) * DIM, H),
        "attention.wo.weight": (H, HEADS * DIM),
        "feed_forward.w1.weight": (WIDTH, H),
        "feed_forward.w3.weight": (WIDTH, H),
        "feed_forward.w2.weight": (H, WIDTH),
    }
    shapes = {"model.tok_embeddings.weight": (VOCAB, H), "model.norm.weight": (H,)}
    for number in range(layers):
        shapes |= {f"model.layers.{number}.{tail}": shape for tail, shape in tails.items()}
    return {**shapes, "output.weight": (VOCAB, H)}


def statuses(alignment):
    """Status -> number of records, without zeros."""
    counts = {}
    for record in alignment.records:
        counts[record.status] = counts.get(record.status, 0) + 1
    return counts


def fill(shapes):
    """Name -> flat list of numbers that no two elements share."""
    data, start = {}, 0
    for name in sorted(shapes):
        count = 1
        for size in shapes[name]:
            count *= size
        data[name] = list(range(start, start + count))
        start += count
    return data


def assemble(pair, data):
    """The pair's tensor as rows of numbers; fails unless parts cover it exactly once."""
    shape = pair.shape
    cols = shape[-1] if len(shape) > 1 else 1
    total = 1
    for size in shape:
        total *= size
    grid = [[None] * cols for _ in range(total // cols if cols else 0)]
    for part in pair.parts:
        for i in range(part.rows):
            for j in range(part.cols):
                assert grid[part.row + i][part.col + j] is None
                at = part.offset + i * part.row_stride + j * part.col_stride
                assert at >= 0
                grid[part.row + i][part.col + j] = data[part.name][at]
    assert all(value is not None for row in grid for value in row)
    return grid
