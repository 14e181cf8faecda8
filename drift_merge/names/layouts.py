"""Names of single tensors: wrappers to strip, synonyms of the llama names, buffers.

Canonical names are those of a plain llama-like text LLM without prefix:
`layers.3.mlp.up_proj.weight`, `embed_tokens.weight`, `norm.weight`, `lm_head.weight`.
"""

import re
from functools import lru_cache

from drift_merge.names.tensors import Shape

LISTS = ("layers", "h", "blocks", "layer")  # what a list of decoder layers is called
EMBEDDINGS = ("embed_tokens", "tok_embeddings", "wte", "word_embeddings", "embed_in")
NORMS = ("norm", "final_layernorm", "final_layer_norm", "ln_f", "final_norm", "norm_f")
# In order of preference; the last is BERT's, a module of several.
HEADS = ("lm_head", "embed_out", "output", "output_layer", "unembed", "cls.predictions")

# Names of tables of tokens that are not in EMBEDDINGS, and of what is no table of tokens.
_TOKEN_TABLE = re.compile(r"(?:^|_)(?:embed|embeddings?|embed_tokens|word_embeddings|wte)$")
_NO_TOKENS = re.compile(r"pos|type|patch|segment|relative|time|speaker")
# What is no language, by the words of its name.
_OTHER_SENSES = re.compile(
    r"vis|image|img|patch|pixel|mm_|multi_modal|multimodal|projector|connector|resampler|perceiver"
    r"|siglip|clip|vit(?![a-z])|audio|speech|codec|video|protein|sam_|vq"
)

# Modules that DDP, torch.compile, FSDP, activation checkpointing and PEFT put into a name.
# An adapter's name never starts with an underscore, so that a wrapper is not taken for one.
_WRAPPERS = re.compile(
    r"(?:(?<=\.)|^)(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module"
    r"|base_layer|original_module|modules_to_save\.[^._][^.]*)\."
)
_LEADING_WRAPPERS = re.compile(r"^(?:module\.|base_model\.model\.)+")

_ADAPTERS = re.compile(r"\.(?:lora_|ia3_|vera_|oft_|boft_|hada_|dora_)")

_BUFFERS = frozenset(("masked_bias", "rope_freqs", "position_ids", "cos_cached", "sin_cached"))
_MASKS = (".attn.bias", ".attention.bias")

# Tails of a layer's names in other layouts, and the llama tail that holds the same matrix.
# Meta's own attention.wq and wk are left out on purpose: their rows are permuted.
_SYNONYMS = {
    "attention.wqkv": "self_attn.wqkv",  # InternLM2: interleaved, so not qkv_proj
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
    "ff_norm": "post_attention_layernorm",
}
_MOE = re.compile(r"(?:block_sparse_)?moe\.")
_STACKED_EXPERTS = re.compile(r"mlp\.((?:gate|up|down)_proj)\.weight$")  # Step: no module for them
_ROUTER_BIAS = "e_score_correction_bias"  # lies in the router, or beside it
_ROUTER_BIASES = frozenset((_ROUTER_BIAS, "router_bias", "expert_bias"))  # DeepSeek, Step, LFM
_MIXTRAL_EXPERT = re.compile(r"^block_sparse_moe\.experts\.(\d+)\.(w[123])\.")
_MIXTRAL_NAMES = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}


def is_token_table(module: str) -> bool:
    """Whether a module, by the last part of its name, may be the embedding of tokens."""
    if module in EMBEDDINGS:
        return True
    return _TOKEN_TABLE.search(module) is not None and _NO_TOKENS.search(module) is None


def is_other_sense(name: str) -> bool:
    """Whether a name speaks of images, sound or what connects them with language."""
    return _OTHER_SENSES.search(name.lower()) is not None


def is_router_bias(name: str) -> bool:
    """Whether `name` is the bias that balances experts: a counter's, no gradient changes it."""
    return name.rpartition(".")[2] in _ROUTER_BIASES


def strip_wrappers(name: str) -> str:
    """Return `name` without the modules that wrapping a model puts into it, in any order.

    >>> strip_wrappers("module.base_model.model.model.layers.0.mlp.up_proj.base_layer.weight")
    'model.layers.0.mlp.up_proj.weight'
    """
    # Nearly all names have no wrapper, and a model may have 100,000 of them.
    while "module" in name or "_mod." in name or "base_" in name:
        stripped = _LEADING_WRAPPERS.sub("", _WRAPPERS.sub("", name))
        if stripped == name:
            break
        name = stripped
    return name


def is_frozen_copy(name: str) -> bool:
    """Whether `name` is the original that PEFT keeps beside a module it trains and saves."""
    return ".original_module." in name


def is_adapter_weight(name: str) -> bool:
    """Whether `name` is a weight of a PEFT adapter, not of the model."""
    return _ADAPTERS.search(name) is not None


def is_buffer(name: str, shape: Shape | None) -> bool:
    """Whether `name` is a table that code derives (rotary frequencies, causal masks)."""
    if name.endswith(".weight"):  # nearly all names: no more to look at
        return False
    leaf = name.rpartition(".")[2]
    if leaf in _BUFFERS or leaf.endswith("inv_freq"):
        return True
    # A causal mask has two dimensions or more; a bias of the attention itself has one.
    return leaf == "bias" and name.endswith(_MASKS) and (shape is None or len(shape) > 1)


@lru_cache(maxsize=2**14)  # layers are alike
def rename_tail(tail: str) -> str:
    """Return the llama name of a tail such as `feed_forward.w1.weight`, or `tail` itself.

    >>> rename_tail("feed_forward.w1.weight")
    'mlp.gate_proj.weight'
    """
    module, _, leaf = tail.rpartition(".")
    if module in _SYNONYMS:
        return f"{_SYNONYMS[module]}.{leaf}"
    if found := _MIXTRAL_EXPERT.match(tail):
        return f"mlp.experts.{found[1]}.{_MIXTRAL_NAMES[found[2]]}.{tail[found.end() :]}"
    if found := _MOE.match(tail):
        tail = f"mlp.{tail[found.end() :]}"
        if stacked := _STACKED_EXPERTS.match(tail):
            return f"mlp.experts.{stacked[1]}"
    return f"mlp.gate.{_ROUTER_BIAS}" if tail == f"mlp.{_ROUTER_BIAS}" else tail
