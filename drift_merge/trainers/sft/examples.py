"""Examples for supervised fine-tuning: a JSON Lines file of image, question and answer.

    {"image": "pictures/1.png", "question": "What is shown?", "answer": "A circle."}

The path of the image is relative to the file. The processor and its chat template are the
model's own; only the answer is learned.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from drift_merge.errors import CheckpointError, RecipeError, SourceError
from drift_merge.trainers.wiring import optional

IGNORED = -100  # a label that the loss leaves out
_KEYS = ("image", "question", "answer")


@dataclass(frozen=True, slots=True)
class Example:
    """One line of the file."""

    image: Path
    question: str
    answer: str


def read_examples(path: Path) -> list[Example]:
    """Read and check every line; images are only looked for, not opened.

    Raises:
        SourceError: the file or an image is not there.
        RecipeError: a line is not an object with three texts, or there is no line.
    """
    try:
        # Not splitlines(): U+2028 and U+0085 may stand within a text. A BOM is no part of it.
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise SourceError(
            f"{path} cannot be read: {error}.", remedy="Check the path given with --data."
        ) from error
    examples = [
        _read_line(line, path, number) for number, line in enumerate(lines, 1) if line.strip()
    ]
    if not examples:
        raise RecipeError(f"{path} holds no example.", remedy=f"Each line is {_form()}")
    return examples


def _read_line(line: str, path: Path, number: int) -> Example:
    where = f"{path}, line {number:,}"
    try:
        value = json.loads(line)
    except ValueError as error:
        raise RecipeError(f"{where} is not JSON: {error}.", remedy=f"It is {_form()}") from error
    if not isinstance(value, dict):
        raise RecipeError(f"{where} is not an object.", remedy=f"It is {_form()}")
    wrong = [key for key in _KEYS if not isinstance(value.get(key), str) or not value[key].strip()]
    if wrong:
        raise RecipeError(
            f"{where}: {' and '.join(wrong)} {'are' if wrong[1:] else 'is'} missing or no text.",
            remedy=f"It is {_form()}",
        )
    image = path.parent / value["image"]
    if not image.is_file():
        raise SourceError(
            f"{where}: there is no image {image}.",
            remedy=f"Paths of images are relative to the folder of {path.name}:"
            f" {path.parent.resolve()}",
        )
    return Example(image, value["question"], value["answer"])


def _form() -> str:
    return '{"image": "1.png", "question": "...", "answer": "..."}'


def load_processor(directory: Path, label: str) -> Any:
    """The processor of an MLLM, whose chat template and padding serve training.

    Raises:
        CheckpointError: it cannot be loaded, or has no chat template.
    """
    transformers = optional("transformers", install="pip install 'drift_merge[train]'")
    try:
        processor = transformers.AutoProcessor.from_pretrained(directory)
    except Exception as error:  # the library raises whatever its parts raise
        raise CheckpointError(
            f"the processor of {label} cannot be loaded: {type(error).__name__}: {error}",
            remedy="It needs preprocessor_config.json and the tokenizer's files beside the weights;"
            " for some models also: pip install torchvision num2words",
        ) from error
    if not hasattr(processor, "image_processor") or not hasattr(processor, "tokenizer"):
        raise CheckpointError(
            f"{label} has no processor for images, only a {type(processor).__name__}.",
            remedy="Give a multimodal model, with its preprocessor_config.json.",
        )
    if getattr(processor, "chat_template", None) is None:
        raise CheckpointError(
            f"{label} has no chat template, so that questions and answers have no form.",
            remedy=f"Put the model's own chat_template.jinja into {directory}",
        )
    processor.tokenizer.padding_side = "right"  # labels are counted from the left
    if processor.tokenizer.pad_token_id is None:
        processor.tokenizer.pad_token = processor.tokenizer.eos_token
    return processor


class Collator:
    """Examples to a batch with labels on the answers alone."""

    def __init__(self, processor: Any) -> None:
        self._processor = processor

    def __call__(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        """A batch, padded on the right.

        Raises:
            SourceError: an image cannot be opened.
            CheckpointError: the chat template leaves answers out.
        """
        images = [_open_image(example.image) for example in examples]
        batch = self._encode(examples, images, with_answers=True)
        questions = self._encode(examples, images, with_answers=False)
        ids, asked = batch["input_ids"], questions["input_ids"]
        width = min(ids.shape[1], asked.shape[1])
        # Not the length of the question alone: its last token may merge with the answer's first.
        known = (ids[:, :width] == asked[:, :width]) & questions["attention_mask"][:, :width].bool()
        labels = ids.masked_fill(batch["attention_mask"] == 0, IGNORED)
        labels[:, :width].masked_fill_(known.long().cumprod(1).bool(), IGNORED)
        if bool((labels == IGNORED).all(1).any()):
            raise CheckpointError(
                "the chat template leaves the answer out, so that there is nothing to learn.",
                remedy="Use a template that renders the assistant's turns.",
            )
        return {**batch, "labels": labels}

    def _encode(
        self, examples: Sequence[Example], images: list[Any], *, with_answers: bool
    ) -> Mapping[str, Tensor]:
        texts = [
            self._processor.apply_chat_template(
                _messages(example, with_answer=with_answers),
                add_generation_prompt=not with_answers,
                tokenize=False,
            )
            for example in examples
        ]
        encoded: Mapping[str, Tensor] = self._processor(
            text=texts, images=images, padding=True, return_tensors="pt"
        )
        return encoded


def _messages(example: Example, *, with_answer: bool) -> list[dict[str, Any]]:
    question = [{"type": "image"}, {"type": "text", "text": example.question}]
    answer = [{"type": "text", "text": example.answer}]
    asked = [{"role": "user", "content": question}]
    return [*asked, {"role": "assistant", "content": answer}] if with_answer else asked


def _open_image(path: Path) -> Any:
    image = optional("PIL.Image", install="pip install pillow")
    try:
        with image.open(path) as opened:
            return opened.convert("RGB")
    except OSError as error:
        raise SourceError(
            f"{path} cannot be opened as an image: {error}.",
            remedy="Replace it, or take its line out of the file.",
        ) from error
