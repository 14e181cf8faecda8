"""The tiny models: an ancestor B, a text reasoner R, an MLLM M that sees; trained once, kept.

All are classes of transformers, saved as anybody's: Llama, and LLaVA around it with a CLIP tower.
"""

import itertools
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import nn
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from tests.benchmarks.study import data
from tests.benchmarks.study.data import CHARACTERS, Batch, Example, Words

LONGEST = 48  # tokens that an answer may take
TEXT = LlamaConfig(
    vocab_size=data.VOCABULARY,
    hidden_size=128,
    intermediate_size=512,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=4,
    max_position_embeddings=128,
    tie_word_embeddings=False,
    pad_token_id=CHARACTERS.pad,
    bos_token_id=None,
    eos_token_id=CHARACTERS.end,
)
VISION = CLIPVisionConfig(
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=2,
    image_size=data.SIDE,
    patch_size=data.PATCH,
)


def learn(
    model: nn.Module,
    examples: Iterator[Example],
    *,
    steps: int,
    rate: float,
    size: int = 32,
    trained: Callable[[str], bool] = lambda _name: True,
    words: Words = CHARACTERS,
    say: Callable[[str], None] = lambda _line: None,
) -> float:
    """AdamW with warm-up and a linear end on mixed examples; return the last loss."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad = trained(name)
    chosen = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(chosen, lr=rate, weight_decay=0.0)
    warm = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm, (steps - step) / (steps - warm + 1))
    )
    model.train()
    started, loss = time.monotonic(), torch.zeros(())
    for step in range(steps):
        loss = model(**data.collate(list(itertools.islice(examples, size)), words)).loss
        loss.backward()
        nn.utils.clip_grad_norm_(chosen, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 100 == 99:
            say(f"step {step + 1}: loss {loss.item():.4f}, {time.monotonic() - started:.0f} s")
    return loss.item()


@torch.no_grad()
def right(
    model: nn.Module, examples: list[Example], words: Words = CHARACTERS, size: int = 100
) -> list[bool]:
    """Which of some examples a model answers exactly right, by greedy decoding."""
    model.eval()
    found: list[bool] = []
    for begin in range(0, len(examples), size):
        some = examples[begin : begin + size]
        batch: Batch = data.prompts(some, words)
        ids = model.generate(
            **batch,
            max_new_tokens=LONGEST,
            do_sample=False,
            pad_token_id=words.pad,
            eos_token_id=words.end,
        )
        for row, example in zip(ids[:, batch["input_ids"].shape[1] :].tolist(), some, strict=True):
            found.append(data.decode(row, words).rpartition(";")[2] == example.final)
    return found


def take(
    kind: Callable[[str, random.Random], Iterator[Example]], split: str, count: int, seed: str
):
    """The first examples of a kind; equal seeds give equal ones."""
    return list(itertools.islice(kind(split, random.Random(f"{seed} {split}")), count))


def make_ancestor(out: Path, *, steps: int, say: Callable[[str], None]) -> None:
    """B: facts of addition, and copying."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(TEXT)
    learn(model, data.text_facts("train", random.Random("B")), steps=steps, rate=1e-3, say=say)
    model.save_pretrained(out)


def make_reasoner(ancestor: Path, out: Path, *, steps: int, say: Callable[[str], None]) -> None:
    """R: B, fine-tuned on worked sums."""
    model = LlamaForCausalLM.from_pretrained(ancestor)
    rng = random.Random("R")
    lessons = data.mixed(data.text_sums("train", rng), data.text_facts("train", rng), rng=rng)
    learn(model, lessons, steps=steps, rate=5e-4, say=say)
    model.save_pretrained(out)


def make_mllm(ancestor: Path, out: Path, *, steps: int, say: Callable[[str], None]) -> None:
    """M: B with eyes; the vision tower and the connector first, then the tower too."""
    torch.manual_seed(1)
    text = LlamaForCausalLM.from_pretrained(ancestor)
    config = LlavaConfig(
        text_config=TEXT,
        vision_config=VISION,
        image_token_index=CHARACTERS.image,
        image_seq_length=data.PATCHES,
        vision_feature_layer=-1,
        tie_word_embeddings=False,
    )
    model = LlavaForConditionalGeneration(config)
    model.model.language_model.load_state_dict(text.model.state_dict())
    model.lm_head.load_state_dict(text.lm_head.state_dict())
    rng = random.Random("M")
    lessons = data.mixed(data.transcriptions("train", rng), data.shapes("train", rng), rng=rng)
    eyes = steps // 3
    learn(model, lessons, steps=eyes, rate=2e-3, trained=lambda n: "language" not in n, say=say)
    learn(model, lessons, steps=steps - eyes, rate=5e-4, say=say)
    model.save_pretrained(out)
