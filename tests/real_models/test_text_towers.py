"""LLaVA around every text LLM of transformers: attach biases each parameter by its own delta.

What is saved has the names and layouts of the disk, what is trained those of memory; which is
which is read from the modules: the tower of LLaVA is the same class as the body of the text LLM.
Sizes are small and differ, so that a shape tells most matrices apart; values are all different.
"""

import hashlib
from math import prod
from pathlib import Path

import pytest
import torch

import drift_merge

transformers = pytest.importorskip("transformers")

pytestmark = [pytest.mark.engines, pytest.mark.filterwarnings("default")]

_TOWERS = """
afmoe apertus apertus1p5_text arcee aria_text axk1 axk2 bailing_hybrid beam biogpt bitnet codegen
cohere cohere2 cohere2_moe cwm deepseek_v2 deepseek_v3 deepseek_v32 diffllama doge ernie4_5
ernie4_5_moe exaone exaone4 exaone_moe flex_olmo flint gemma gemma2 gemma3_text gemma3n_text glm
glm4 glm4_moe glm4_moe_lite glm_moe_dsa gpt_neox gpt_oss gptj granite granite_swa granitemoe
granitemoe_swa granitemoehybrid granitemoeshared helium hy_v3 hy_v4 hyperclovax internlm3
iquestcoder jais2 jetmoe kolibri1 laguna lara_mini lfm2 lfm3 llama llama4_text longcat_flash mellum
mimo_v2_flash minicpm3 minimax minimax_m2 minimax_m3_vl_text ministral3 mistral mixtral moshi
nanochat olmo olmo2 olmo3 olmo_hybrid olmoe persimmon phi phi3 phimoe qwen2 qwen2_moe qwen3
qwen3_5_moe_text qwen3_5_text qwen3_moe qwen3_next sarvam_mla sarvam_moe seed_oss smollm3 solar_open
stablelm starcoder2 vaultgemma xglm youtu zamba2
"""

SIZES = (
    dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), 96)
    | dict.fromkeys(("hidden_size", "d_model", "n_embd", "word_embed_proj_dim", "lru_width"), 32)
    | dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size"), 48)
    | dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers"), 3)
    | dict.fromkeys(("num_attention_heads", "n_head", "num_heads"), 4)
    | dict.fromkeys(("num_key_value_heads", "linear_num_key_heads", "index_n_heads"), 2)
    | dict.fromkeys(("head_dim", "rotary_dim", "hidden_size_per_layer_input"), 8)
    | dict.fromkeys(("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"), 8)
    | dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 8)
    | dict.fromkeys(("q_lora_rank", "kv_lora_rank", "index_head_dim", "mamba_d_head"), 16)
    | dict.fromkeys(("mamba_d_state", "mamba_head_dim", "ssm_state_size"), 16)
    | dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4)
    | dict.fromkeys(("mamba_n_heads", "mamba_num_heads", "linear_num_value_heads", "index_topk"), 4)
    | dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k", "bos_token_id"), 2)
    | dict.fromkeys(("n_shared_experts", "first_k_dense_replace", "n_group", "topk_group"), 1)
    | dict.fromkeys(("mamba_n_groups", "n_groups", "num_kv_shared_layers", "eos_token_id"), 1)
    | dict.fromkeys(("max_position_embeddings", "n_positions"), 64)
    | {"moe_intermediate_size": 24, "expert_ffn_hidden_size": 24, "pad_token_id": 0}
    | {"shared_expert_intermediate_size": 40, "block_ff_dim": 48, "conv_dim": 32}
)
# Kinds of layers that the default of a hybrid leaves out: without any, it has no attention.
UNSAID = {"granitemoehybrid": ["mamba", "attention"]}
VISION = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
VISION |= {"num_attention_heads": 2, "image_size": 28, "patch_size": 14}


def small_config(kind):
    """The config of a text LLM, with one layer of each of its kinds."""
    cls = transformers.CONFIG_MAPPING[kind]
    default, other_names = cls(), getattr(cls, "attribute_map", None) or {}
    values = {
        key: size
        for key, size in SIZES.items()
        if key == "pad_token_id" or getattr(default, key, None) is not None
    }
    values = {k: v for k, v in values.items() if other_names.get(k) not in values}
    count = values.get(other_names.get("num_hidden_layers", "num_hidden_layers"), 3)
    for key in ("layer_types", "mlp_layer_types", "layers_block_type"):
        if isinstance(kinds := getattr(default, key, None), list) and kinds:
            kinds = list(dict.fromkeys([*kinds, *UNSAID.get(kind, [])]))
            values[key] = [kinds[i % len(kinds)] for i in range(count)]
    return cls(**values)


def fill(model, salt):
    """Values of their own for everything that a checkpoint stores."""
    stored = model.state_dict()
    for name, tensor in stored.items():
        if tensor.is_floating_point():
            digest = hashlib.sha256(f"{salt}{name}".encode()).digest()[:6]
            generator = torch.Generator().manual_seed(int.from_bytes(digest, "little"))
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.05)
    return model


def make_pair(kind: str, folder: Path):
    """Write a LLaVA around a text LLM and another such LLM; return the LLM."""
    config = transformers.LlavaConfig(
        text_config=small_config(kind),
        vision_config=transformers.CLIPVisionConfig(**VISION),
        image_token_index=3,
    )
    mllm = transformers.LlavaForConditionalGeneration(config).float()
    fill(mllm, "mllm").save_pretrained(folder / "mllm")
    text = transformers.AutoModelForCausalLM.from_config(small_config(kind)).float()
    fill(text, "reasoner").save_pretrained(folder / "reasoner")
    return text


@pytest.mark.parametrize("kind", _TOWERS.split())
def test_every_parameter_of_the_tower_is_biased_by_its_own_delta(kind, tmp_path):
    if kind not in transformers.CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {kind}")
    text = make_pair(kind, tmp_path)
    modules = "attn,mlp,norm,re:^layers"
    prior = drift_merge.compute(
        tmp_path / "reasoner",
        tmp_path / "mllm",
        tmp_path / "prior",
        dtype="float32",
        modules=modules,
        threads=1,
    )
    model = transformers.LlavaForConditionalGeneration.from_pretrained(
        tmp_path / "mllm", dtype=torch.float32
    )
    handle = drift_merge.attach(model, prior, rule="absolute", alpha=1.0, modules=modules)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    handle.apply()

    tower, values = model.model.language_model, text.state_dict()
    prefix = next(n for n, m in text.named_modules() if type(m) is type(tower))
    biased = 0
    for name, parameter in model.named_parameters():
        if parameter.grad.any():
            inside = f"{prefix}." * bool(prefix) + name.removeprefix("model.language_model.")
            delta = values[inside].double() - parameter.detach().double()
            assert torch.allclose(-parameter.grad.double(), delta, atol=1e-6), name
            biased += parameter.numel()
    buffers = sum(model.get_buffer(name).numel() for name in handle.coverage.buffers)
    assert biased + buffers == sum(prod(entry["shape"]) for entry in prior.tensors.values())
    assert handle.coverage.matched == handle.coverage.selected == len(prior.tensors)
