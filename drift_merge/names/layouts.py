"""Names of single tensors: wrappers to strip, synonyms of the llama names, buffers.

Canonical names are those of a plain llama-like text LLM without prefix:
`layers.3.mlp.up_proj.weight`, `embed_tokens.weight`, `norm.weight`, `lm_head.weight`.
"""

import re

from drift_merge.names.tensors import Shape

LISTS = ("layers", "h", "blocks")  # what a list of decoder layers is called
EMBEDDINGS = ("embed_tokens", "tok_embeddings", "wte", "word_embeddings", "embed_in")
NORMS = ("norm", "final_layernorm", "final_layer_norm", "ln_f", "final_norm", "norm_f")
HEADS = ("lm_head", "embed_out", "output")  # in order of preference

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
    "block_sparse_moe.gate": "mlp.gate",
}
_MIXTRAL_EXPERT = re.compile(r"^block_sparse_moe\.experts\.(\d+)\.(w[123])\.")
_MIXTRAL_NAMES = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}


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
    leaf = name.rpartition(".")[2]
    if leaf in _BUFFERS or leaf.endswith("inv_freq"):
        return True
    # A causal mask has two dimensions or more; a bias of the attention itself has one.
    return leaf == "bias" and name.endswith(_MASKS) and (shape is None or len(shape) > 1)


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
    return tail
