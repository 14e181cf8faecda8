"""Count the right answers of a model of the SmolLM2 pair: worked sums, and questions on pictures.

    python tests/real_models/score_pair.py MODEL OUT --sums 24 --pictures 24 --split validation

Greedy answers to held-out items of `lessons.py`; one JSON object on stdout, and the score of each
item in OUT/items.json. Made for `drift-merge search --evaluate`, see `README.md`.
"""

import argparse
import itertools
import json
import re
from pathlib import Path
from typing import Any

import torch
from lessons import conversation, pictures, sums
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor
from transformers.utils.logging import disable_progress_bar

SEEDS = {"validation": 2_000, "final": 3_000}  # the trainings use 0 and 1,000
SUM_TOKENS, PICTURE_TOKENS = 72, 4


def answers(model: Any, processor: Any, inputs: Any, max_tokens: int) -> list[str]:
    """The greedy continuations of a batch that is padded on the left."""
    inputs.pop("token_type_ids", None)
    out = model.generate(**inputs, max_new_tokens=max_tokens, do_sample=False)
    new = out[:, inputs["input_ids"].shape[1] :]
    return processor.batch_decode(new, skip_special_tokens=True)


def right_sums(model: Any, tokenizer: Any, seed: int, count: int) -> dict[str, bool]:
    """Whether the last number of each answer is the right one."""
    found: dict[str, bool] = {}
    lessons = list(itertools.islice(sums(seed), count))
    prompts = [
        f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
        for question, _ in lessons
    ]
    inputs = tokenizer(text=prompts, padding=True, return_tensors="pt")
    texts = answers(model, tokenizer, inputs, SUM_TOKENS)
    for number, (text, (_, worked)) in enumerate(zip(texts, lessons, strict=True)):
        numbers, (right,) = re.findall(r"\d+", text), re.findall(r"is (\d+)\.$", worked)
        found[f"sum-{number}"] = numbers[-1:] == [right]
    return found


def right_pictures(model: Any, processor: Any, seed: int, count: int) -> dict[str, bool]:
    """Whether the first word of each answer is the right one; the first question of each image."""
    items = list(itertools.islice(pictures("test", seed), count))
    prompts = [
        processor.apply_chat_template(
            conversation((image, asked[:1]))[:1], add_generation_prompt=True
        )
        for image, asked in items
    ]
    inputs = processor(
        text=prompts, images=[[image] for image, _ in items], padding=True, return_tensors="pt"
    )
    texts = answers(model, processor, inputs, PICTURE_TOKENS)
    return {
        f"picture-{number}": text.strip().lower().split()[:1] == asked[0][1].lower().split()[:1]
        for number, (text, (_, asked)) in enumerate(zip(texts, items, strict=True))
    }


def main() -> None:
    """Load in float32 (bfloat16 is slow on a CPU), ask, count, write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--sums", type=int, default=24)
    parser.add_argument("--pictures", type=int, default=24)
    parser.add_argument("--split", choices=SEEDS, default="validation")
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    disable_progress_bar()
    is_mllm = "vision_config" in json.loads((given.model / "config.json").read_text())
    kind = AutoModelForImageTextToText if is_mllm else AutoModelForCausalLM
    model = kind.from_pretrained(given.model, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(given.model)
    tokenizer = processor.tokenizer if is_mllm else processor
    tokenizer.padding_side = "left"
    seed = SEEDS[given.split]
    found = {"sums": right_sums(model, tokenizer, seed, given.sums)}
    if is_mllm:
        found["pictures"] = right_pictures(model, processor, seed, given.pictures)
    shares = {name: sum(items.values()) / len(items) for name, items in found.items()}
    (given.out / "items.json").write_text(json.dumps(found))
    print(json.dumps(shares))


if __name__ == "__main__":
    main()
