"""Models of transformers that two suites make, each in its own sizes; random weights."""

from collections.abc import Mapping
from typing import Any

IMAGE, VISION_START, VISION_END = 90, 91, 92  # tokens; the last also ends an image of Gemma 3


def qwen2(text: Mapping[str, Any]) -> Any:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    return Qwen2ForCausalLM(Qwen2Config(**text))


def llama(text: Mapping[str, Any]) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**text))


def llava(text: Mapping[str, Any], vision: Mapping[str, Any]) -> Any:
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
    )

    config = LlavaConfig(
        text_config=LlamaConfig(**text),
        vision_config=CLIPVisionConfig(**vision, projection_dim=vision["hidden_size"]),
        image_token_index=IMAGE,
        image_seq_length=4,
        tie_word_embeddings=False,
    )
    return LlavaForConditionalGeneration(config)


def idefics3(text: Mapping[str, Any], vision: Mapping[str, Any], kind: str = "Idefics3") -> Any:
    """Idefics3, or its twin "SmolVLM"; patches of 7 x 7 pixels."""
    import transformers

    config = getattr(transformers, f"{kind}Config")(
        text_config=transformers.LlamaConfig(**text),
        vision_config={**vision, "patch_size": 7},
        scale_factor=2,
        image_token_id=IMAGE,
        tie_word_embeddings=False,
        pad_token_id=0,
    )
    return getattr(transformers, f"{kind}ForConditionalGeneration")(config)
