"""What the small trainings learn from: seeded sums with working, and easy-VQA conversations.

Only answers are learned: labels are `IGNORED` elsewhere.
"""

import itertools
import random
from collections import defaultdict
from collections.abc import Iterator

import easy_vqa
import torch
from PIL import Image
from torch import Tensor
from transformers import Idefics3Processor, PreTrainedTokenizerFast

NAMES = ("Mia", "Omar", "Lena", "Ravi", "Noah", "Aiko")
THINGS = ("marbles", "stickers", "apples", "pencils", "coins", "shells")
TURNS = 4  # questions asked about one image
IGNORED = -100

Batch = dict[str, Tensor]
VqaItem = tuple[Image.Image, list[tuple[str, str]]]  # picture; (question, answer) pairs


def sums(seed: int) -> Iterator[tuple[str, str]]:
    """Yield (question, worked answer) without end; equal seeds give equal lessons."""
    rng = random.Random(seed)
    while True:
        name, thing = rng.choice(NAMES), rng.choice(THINGS)
        start, bags, each = rng.randint(2, 40), rng.randint(2, 9), rng.randint(2, 9)
        bought = bags * each
        given = rng.randint(1, start + bought - 1)
        question = (
            f"{name} has {start} {thing}, buys {bags} bags of {each} {thing} "
            f"and gives away {given}. How many {thing} are left?"
        )
        answer = (
            f"Bought: {bags} * {each} = {bought}. Together: {start} + {bought} = {start + bought}. "
            f"Left: {start + bought} - {given} = {start + bought - given}. "
            f"The answer is {start + bought - given}."
        )
        yield question, answer


def pictures(split: str, seed: int) -> Iterator[VqaItem]:
    """Yield images of an easy-VQA split, train or test, with `TURNS` questions, without end."""
    questions, answers, image_ids = getattr(easy_vqa, f"get_{split}_questions")()
    paths = getattr(easy_vqa, f"get_{split}_image_paths")()
    by_image = defaultdict(list)
    for question, answer, image_id in zip(questions, answers, image_ids, strict=True):
        by_image[image_id].append((question, answer))
    rng = random.Random(seed)
    ids = sorted(image_id for image_id, asked in by_image.items() if len(asked) >= TURNS)
    while True:
        image_id = rng.choice(ids)
        with Image.open(paths[image_id]) as image:
            yield image.convert("RGB"), rng.sample(by_image[image_id], TURNS)


def label_answers(ids: Tensor, opening: list[int], closing: int) -> Tensor:
    """Copy (batch, length) ids where an answer stands, its closing token included; ignore the rest.

    An answer runs from behind the tokens `opening` to the next token `closing`.
    """
    labels = torch.full_like(ids, IGNORED)
    for row, sequence in enumerate(ids.tolist()):
        answering = False
        for i, token in enumerate(sequence):
            if answering:
                labels[row, i] = token
                answering = token != closing
            else:
                answering = sequence[max(0, i + 1 - len(opening)) : i + 1] == opening
    return labels


def text_batches(tokenizer: PreTrainedTokenizerFast, seed: int, size: int) -> Iterator[Batch]:
    """Yield batches of worked sums in the base's own chat form."""
    lessons = sums(seed)
    tokenizer.padding_side = "right"
    opening = tokenizer("<|im_start|>assistant\n")["input_ids"]
    while True:
        texts = [
            f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n{answer}<|im_end|>\n"
            for question, answer in itertools.islice(lessons, size)
        ]
        tokens = tokenizer(texts, padding=True, return_tensors="pt")
        batch = {key: tokens[key] for key in ("input_ids", "attention_mask")}
        yield batch | {"labels": label_answers(batch["input_ids"], opening, tokenizer.eos_token_id)}


def conversation(item: VqaItem) -> list[dict]:
    """Write one image and its questions and answers as chat messages."""
    messages = []
    for turn, (question, answer) in enumerate(item[1]):
        image = [] if turn else [{"type": "image"}]
        messages += [
            {"role": "user", "content": [*image, {"type": "text", "text": question}]},
            {"role": "assistant", "content": [{"type": "text", "text": answer}]},
        ]
    return messages


def vqa_batches(processor: Idefics3Processor, split: str, seed: int, size: int) -> Iterator[Batch]:
    """Yield batches of images with several questions and answers each."""
    items = pictures(split, seed)
    tokenizer = processor.tokenizer
    tokenizer.padding_side = "right"
    opening = tokenizer("Assistant:")["input_ids"]
    while True:
        chosen = list(itertools.islice(items, size))
        texts = [processor.apply_chat_template(conversation(item)) for item in chosen]
        images = [[image] for image, _ in chosen]
        batch = processor(text=texts, images=images, padding=True, return_tensors="pt")
        yield {
            **batch,
            "labels": label_answers(batch["input_ids"], opening, tokenizer.eos_token_id),
        }
