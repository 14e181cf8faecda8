"""Make the configs of transformers small: by the name of a field, with exceptions in a table.

Sizes differ wherever a config lets them (hidden, mlp, experts, heads, key-value heads, head size),
so that a shape tells most matrices apart; of the layers one of each kind stays.
"""

import re
from collections.abc import Mapping
from typing import Any

VOCABULARY = 128
HIDDEN, WIDTH, EXPERT_WIDTH = 32, 48, 24

_SIZES = {
    "head_dim": 8,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 12,
    "v_head_dim": 12,
    "kv_lora_rank": 16,
    "q_lora_rank": 20,
    "num_experts_per_tok": 2,
    "moe_k": 2,
    "moe_topk": 2,
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "max_position_embeddings": 64,
    "hidden_size_per_layer_input": 6,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "mamba_num_heads": 4,
    "mamba_head_dim": 8,
    "ssm_state_size": 8,
    "n_groups": 2,
    "mamba_d_state": 8,
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_n_groups": 1,
    "num_query_tokens": 2,
    "sliding_window": 16,
    "context_size": 8,
}
_FIXED = {"image_size": 28, "patch_size": 14, "mrope_section": [2, 1, 1]}
_KEPT = {
    "downsampling_ratios",
    "upsampling_ratios",
    "feedforward_mult",
    "spatial_merge_size",
    "acoustic_tokenizer_chunk_size",
}
# What stands after a pattern is the size of a field whose name it finds; the first one counts.
_PATTERNS = [
    (re.compile(r"intermediate|ffn_dim|ff_dim|mlp_dim|d_ff|inner_dim|n_inner|ffn_hidden"), WIDTH),
    (
        re.compile(
            r"hidden_size|(?:^|_)(?:hidden_dim|d_model|n_embd|embed_dim|embedding_(?:size|dim)|width"
            r"|dim|output_dim|input_dim|proj(?:ection|ector)?_(?:dim|size)|hidden_dimension)$"
        ),
        HIDDEN,
    ),
    (re.compile(r"key_value_heads|kv_heads"), 2),
    (re.compile(r"heads|n_head|expert"), 4),
    (re.compile(r"vocab"), VOCABULARY),
]
_TEXT = re.compile(r"text|llm|language|thinker|talker|decoder|backbone|lm")
_LAYERS = re.compile(r"layers$|n_layer$|^depth$")
_COUNTS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
_TOKEN = re.compile(r"token_(?:id|index|ids)$|_token$|_id$")

DROP = object()  # in a table of exceptions: leave the field to its default
# timm, which wants torchvision, is not in the environment: the vision tower is another one there.
_SIGLIP = {
    "model_type": "siglip_vision_model",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
    "model_args": {"embed_dim": 16},
}
_CODEC = {
    "codec_config": {
        "upsample_groups": 4,
        "num_filters": 4,
        "vector_quantization_hidden_dimension": 8,
    }
}
_SMALL_CODEC = {"num_filters": 4, "depths": [1, 1, 1, 1, 1, 1, 1]}
EXCEPTIONS: dict[str, dict[str, Any]] = {
    "apertus1p5": {
        "text_config": {"vocab_size": 256},
        "vision_config": {"codebook_size": 64},
        "audio_config": {"codebook_size": 64},
        "image_token_offset": 128,
        "audio_token_offset": 192,
    },
    "aria": {
        "projector_patch_to_query_dict": {"4": 4},
        "max_value_projector_patch_to_query_dict": 4,
    },
    "chameleon": {"vocabulary_map": {"<image>": 9}},
    "cohere_compass": {
        "text_config": {
            "layer_types": ["full_attention", "sliding_attention"] * 2,
            "rope_parameters": {
                kind: {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
                for kind in ("full_attention", "sliding_attention")
            },
        }
    },
    "csm": _CODEC,
    "deepseek_ocr2": {
        "text_config": {
            "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
        }
    },
    "diffusion_gemma": {
        "text_config": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 24}
    },
    "dots3_note": {
        "vision_config": {"adapter_in_dim": 32, "adapter_out_dim": 32},
        "audio_config": {"adapter_input_size": 32, "adapter_out_dim": 32},
        "text_config": {
            "num_key_value_heads": 4,
            "head_dim": 20,
            "per_layer_config": {
                i: {
                    "num_attention_heads": 2,
                    "num_key_value_heads": 2,
                    "kv_lora_rank": 24,
                    "qk_nope_head_dim": 12,
                }
                for i in (2, 3)
            },
        },
    },
    "emu3": {"vocabulary_map": {"<image>": 9, "<|extra_200|>": 10}},
    "ernie4_5_vl_moe": {
        "text_config": {
            "moe_intermediate_size": [24, 20],
            "rope_parameters": {"mrope_section": [1, 1, 2]},
        }
    },
    "fast_vlm": {"vision_config": _SIGLIP},
    "florence2": {
        "vision_config": {
            "embed_dim": [8, 8, 16, 16],
            "num_heads": [1, 1, 2, 2],
            "num_groups": [1, 1, 2, 2],
        }
    },
    "fun_asr_nano": {"adaptor_config": {"intermediate_size": 8}},
    "gemma3n": {"text_config": {"num_kv_shared_layers": 0}},
    "glm5_next": {"text_config": {"num_key_value_heads": 4}},
    "granite4_vision": {
        "vision_config": {"hidden_size": 64},
        "deepstack_layer_map": [[0, 0]],
        "downsample_rate": "1/2",
        "spatial_target_layers": [0, 1, 2, 3],
    },
    "hunyuan_vl": {"text_config": {"head_dim": 8}},
    "kyutai_speech_to_text": _CODEC,
    "molmo2": {"adapter_config": {"vision_feature_layer": [1, 0]}},
    "perception_lm": {"vision_config": _SIGLIP},
    "qwen4_exp": {
        "text_config": {
            "indexer_n_heads": 4,
            "indexer_kv_heads": 1,
            "indexer_head_dim": 8,
            "indexer_budget": 8,
            "indexer_compress_ratio": 4,
        }
    },
    "qwen3_omni_moe": {
        "talker_config": {
            "spatial_merge_size": 2,
            "text_config": {"shared_expert_intermediate_size": 28},
        }
    },
    "vibevoice": {"audio_config": _SMALL_CODEC, "semantic_model_config": _SMALL_CODEC},
    "vibevoice_asr": {
        "acoustic_tokenizer_encoder_config": _SMALL_CODEC,
        "semantic_tokenizer_encoder_config": _SMALL_CODEC,
    },
}


def shrink(config: Mapping[str, Any], path: tuple[str, ...] = ()) -> dict[str, Any]:
    """Return the small one of a config's `to_dict()`, nested configs too."""
    count = next((key for key in _COUNTS if isinstance(config.get(key), int)), None)
    layers = _layers_kept(config, config[count]) if count else []
    small = {str(key): _value(str(key), value, path) for key, value in config.items()}
    if count and layers:
        small[count] = len(layers)
    for key, value in config.items():
        if count and isinstance(value, list) and len(value) == config[count] > 1:
            kept = [value[i] for i in layers]
            numbers = all(isinstance(x, int) and not isinstance(x, bool) for x in kept)
            small[key] = [_value(key, x, path) for x in kept] if numbers else kept
        if key == "per_layer_config" and value:
            by_layer = {int(k): v for k, v in value.items()}
            small[key] = {
                new: shrink(by_layer[old], path)
                for new, old in enumerate(layers)
                if old in by_layer
            }
    return small


def merged(config: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config with the exceptions of its family put in."""
    result = dict(config)
    for key, value in changes.items():
        if value is DROP:
            result.pop(key, None)
        elif isinstance(value, Mapping) and isinstance(result.get(key), Mapping):
            result[key] = merged(dict(result[key]), value)
        else:
            result[key] = value
    return result


def _layers_kept(config: Mapping[str, Any], count: int) -> list[int]:
    """Numbers of the layers that stay: the first of each kind, at least four, in their order."""
    lists = [v for v in config.values() if isinstance(v, list) and len(v) == count]
    special = {int(k) for k in config.get("per_layer_config") or {}}
    kinds: dict[str, int] = {}
    for i in range(count):
        kinds.setdefault(str([[v[i] for v in lists if isinstance(v[i], str)], i in special]), i)
    kept = set(kinds.values())
    kept.update([i for i in range(count) if i not in kept][: max(0, 4 - len(kept))])
    return sorted(kept)


def _value(key: str, value: Any, path: tuple[str, ...]) -> Any:
    if key in _FIXED and value is not None:
        return _FIXED[key] if not isinstance(value, list) or key == "mrope_section" else value
    if isinstance(value, Mapping):
        return shrink(value, (*path, key)) if key != "per_layer_config" else value
    if isinstance(value, bool) or not isinstance(value, int) or key in _KEPT:
        return value
    if key in _SIZES:
        return min(value, _SIZES[key])
    if _TOKEN.search(key):
        return value if value < VOCABULARY else 100 + value % 27
    if _LAYERS.search(key):
        return min(value, 4 if not path or _TEXT.search(path[-1]) else 2)
    for pattern, size in _PATTERNS:
        if pattern.search(key):
            is_expert = size == WIDTH and ("moe" in key or "expert" in key)
            return min(value, EXPERT_WIDTH if is_expert else size)
    return min(value, 64) if value >= 256 else value
