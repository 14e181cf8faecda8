"""Perplexity of the pair's models on held-out worked sums and on a paragraph of prose.

python tests/real_models/perplexity.py real/mllm MERGE...
"""

import itertools
import math
import sys

import torch
from lessons import sums
from transformers import AutoModelForImageTextToText, AutoTokenizer

SEED, COUNT = 5000, 48
PROSE = (
    "The city lies on both banks of a wide river, and for most of its history the two halves were "
    "ruled by different princes. A stone bridge of sixteen arches was begun in 1357 and took "
    "forty-five years to finish. Merchants paid a toll to cross it, and the money kept the arches "
    "in repair. When the floods of spring carried away three of them, the guilds of both towns met "
    "for the first time and agreed to rebuild it together."
)


def perplexity(model, tokenizer, texts):
    """exp of the mean loss per token of what stands behind each beginning."""
    loss, count = 0.0, 0
    for given, text in texts:
        ids = [tokenizer(part, add_special_tokens=False).input_ids for part in (given, text)]
        whole = torch.tensor([ids[0] + ids[1]])
        with torch.no_grad():
            logits = model(input_ids=whole).logits[0, :-1].float()
        of_token = torch.nn.functional.cross_entropy(logits, whole[0, 1:], reduction="none")
        loss += float(of_token[-len(ids[1]) :].sum())
        count += len(ids[1])
    return math.exp(loss / count)


if __name__ == "__main__":
    tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
    worked = [
        (f"<|im_start|>User: {question}<|im_end|>\nAssistant:", f" {answer}")
        for question, answer in itertools.islice(sums(SEED), COUNT)
    ]
    for directory in sys.argv[1:]:
        model = AutoModelForImageTextToText.from_pretrained(directory, dtype=torch.float32).eval()
        found = [perplexity(model, tokenizer, t) for t in (worked, [("<|im_start|>", PROSE)])]
        print(f"{directory}: sums {found[0]:.4f}, prose {found[1]:.3f}", flush=True)
