"""Sums in text and in pictures, and easy-VQA: what the small models learn and are asked.

In the tiny models a character is a token. A number in a picture is made of real scanned digits
(scikit-learn's), 8 x 8 pixels each, two numbers of two digits in a picture of 16 x 16. Every split
has sums and scans of its own: no sum and no scan of the test split is ever trained or tuned on.
"""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor

LETTERS = "0123456789+=;:? abcdefghijklmnopqrstuvwxyz"
VOCABULARY = 3 + len(LETTERS)
SIDE, PATCH = 16, 8  # pixels of a picture; a scanned digit fills one patch
PATCHES = (SIDE // PATCH) ** 2
IGNORED = -100
SPLITS = ("train", "validation", "test")


@dataclass(frozen=True, slots=True)
class Example:
    """A question, perhaps with a picture (3, SIDE, SIDE) in [0, 1], and the answer to write."""

    question: str
    answer: str
    picture: Tensor | None = None

    @property
    def final(self) -> str:
        """What is compared: the answer behind its working."""
        return self.answer.rpartition(";")[2]


Batch = dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class Words:
    """How text becomes token ids, and the ids that stand for no text."""

    encode: Callable[[str], list[int]]
    decode: Callable[[list[int]], str]
    pad: int
    end: int
    image: int


CHARACTERS = Words(
    encode=lambda text: [3 + LETTERS.index(letter) for letter in text],
    decode=lambda ids: "".join(LETTERS[i - 3] if i >= 3 else "#" for i in ids),
    pad=0,
    end=1,
    image=2,
)


def worked(a: int, b: int) -> str:
    """The written addition of two numbers of two digits: units, tens with the carry, the sum."""
    units = a % 10 + b % 10
    tens = a // 10 + b // 10 + units // 10
    carry = f"+{units // 10}" if units > 9 else ""
    return f"{a % 10}+{b % 10}={units};{a // 10}+{b // 10}{carry}={tens};{a + b}"


def pairs(split: str) -> list[tuple[int, int]]:
    """All pairs of numbers of two digits of a split: 80, 10 and 10 percent of the 8,100."""
    found = [(a, b) for a in range(10, 100) for b in range(10, 100)]
    random.Random("sums").shuffle(found)
    cuts = (0, len(found) * 8 // 10, len(found) * 9 // 10, len(found))
    number = SPLITS.index(split)
    return found[cuts[number] : cuts[number + 1]]


@cache
def _scans(split: str) -> dict[int, np.ndarray]:
    """The scanned digits of a split, (n, 8, 8) in [0, 1], by what they show."""
    from sklearn.datasets import load_digits

    images, shown = load_digits(return_X_y=True)
    images = images.reshape(-1, PATCH, PATCH) / 16.0
    part = np.arange(len(images)) % 10
    taken = {"train": part < 8, "validation": part == 8, "test": part == 9}[split]
    return {digit: images[taken & (shown == digit)] for digit in range(10)}


def picture(a: int, b: int, split: str, rng: random.Random) -> Tensor:
    """Two numbers of two digits, one above the other, in scans of a split."""
    grid = np.zeros((SIDE, SIDE))
    for place, digit in enumerate((a // 10, a % 10, b // 10, b % 10)):
        row, column = PATCH * (place // 2), PATCH * (place % 2)
        scans = _scans(split)[digit]
        grid[row : row + PATCH, column : column + PATCH] = scans[rng.randrange(len(scans))]
    return torch.tensor(grid, dtype=torch.float32).expand(3, SIDE, SIDE)


def text_facts(split: str, rng: random.Random) -> Iterator[Example]:
    """What the ancestor learns: sums of two digits, and to copy."""
    listed = pairs(split)
    while True:
        if rng.random() < 0.5:
            a, b = rng.randrange(10), rng.randrange(10)
            yield Example(f"{a}+{b}=", str(a + b))
        else:
            a, b = rng.choice(listed)
            yield Example(f"copy {a}+{b}:", f"{a}+{b}")


def text_sums(split: str, rng: random.Random) -> Iterator[Example]:
    """What the reasoner learns: worked sums of numbers of two digits."""
    listed = pairs(split)
    while True:
        a, b = rng.choice(listed)
        yield Example(f"add {a}+{b}:", worked(a, b))


def transcriptions(split: str, rng: random.Random) -> Iterator[Example]:
    """What the MLLM learns of numbers: to read them, not to add them."""
    listed = pairs(split)
    while True:
        a, b = rng.choice(listed)
        yield Example("read:", f"{a}+{b}", picture(a, b, split, rng))


def picture_sums(split: str, rng: random.Random) -> Iterator[Example]:
    """The task: read two numbers in a picture and add them, with working."""
    listed = pairs(split)
    while True:
        a, b = rng.choice(listed)
        yield Example("add:", f"{a}+{b};{worked(a, b)}", picture(a, b, split, rng))


@cache
def _shapes(split: str) -> list[Example]:
    """easy-VQA; its test split is halved into validation and test by picture."""
    import easy_vqa
    from PIL import Image

    part = "train" if split == "train" else "test"
    questions, answers, numbers = getattr(easy_vqa, f"get_{part}_questions")()
    paths = getattr(easy_vqa, f"get_{part}_image_paths")()
    seen: dict[int, Tensor] = {}
    found = []
    for question, answer, number in zip(questions, answers, numbers, strict=True):
        if part == "test" and (number % 2 == 0) != (split == "validation"):
            continue
        if number not in seen:
            with Image.open(paths[number]) as image:
                small = image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BOX)
            seen[number] = torch.tensor(np.asarray(small) / 255.0).permute(2, 0, 1).float()
        found.append(Example(question.lower(), answer.lower(), seen[number]))
    return found


def shapes(split: str, rng: random.Random) -> Iterator[Example]:
    """Questions on a coloured shape."""
    listed = _shapes(split)
    while True:
        yield rng.choice(listed)


def mixed(*parts: Iterator[Example], rng: random.Random) -> Iterator[Example]:
    """Examples of several kinds, equally often."""
    while True:
        yield next(rng.choice(parts))


def encode(example: Example, words: Words) -> tuple[list[int], list[int]]:
    """Token ids of what is given, the picture's places first, and of what is to be written."""
    given = [words.image] * PATCHES if example.picture is not None else []
    return given + words.encode(example.question), [*words.encode(example.answer), words.end]


def decode(ids: list[int], words: Words) -> str:
    """The text of generated ids, up to its end."""
    return words.decode(ids[: ids.index(words.end)] if words.end in ids else ids)


def collate(examples: list[Example], words: Words) -> Batch:
    """A batch to learn from, (batch, length): ids, labels of the answers alone, pictures."""
    rows = [encode(example, words) for example in examples]
    length = max(len(given) + len(answer) for given, answer in rows)
    ids = torch.full((len(rows), length), words.pad)
    labels = torch.full((len(rows), length), IGNORED)
    for i, (given, answer) in enumerate(rows):
        ids[i, : len(given) + len(answer)] = torch.tensor(given + answer)
        labels[i, len(given) : len(given) + len(answer)] = torch.tensor(answer)
    batch = {"input_ids": ids, "attention_mask": (ids != words.pad).long(), "labels": labels}
    return batch | _pictures(examples)


def prompts(examples: list[Example], words: Words) -> Batch:
    """A batch to answer: padded on the left."""
    rows = [encode(example, words)[0] for example in examples]
    length = max(map(len, rows))
    ids = torch.tensor([[words.pad] * (length - len(row)) + row for row in rows])
    return {"input_ids": ids, "attention_mask": (ids != words.pad).long()} | _pictures(examples)


def _pictures(examples: list[Example]) -> Batch:
    found = [example.picture for example in examples if example.picture is not None]
    return {"pixel_values": torch.stack(found)} if found else {}
