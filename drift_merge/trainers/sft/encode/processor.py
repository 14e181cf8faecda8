"""The processor of an MLLM: its template, tokenizer and image processor, called the same way."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from drift_merge.errors import CheckpointError, DriftMergeError
from drift_merge.trainers.sft.encode.spans import Messages
from drift_merge.trainers.wiring import optional


def load_processor(directory: Path, label: str) -> Any:
    """The processor of an MLLM, whose chat template and padding serve training.

    Raises:
        CheckpointError: it cannot be loaded, or has no chat template.
    """
    transformers = optional("transformers", install="pip install 'drift_merge[train]'")
    try:
        processor = transformers.AutoProcessor.from_pretrained(directory, trust_remote_code=False)
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


class Encoder:
    """A processor as functions: turns to text, text to tokens, texts and images to a batch."""

    def __init__(self, processor: Any) -> None:
        self._processor = processor
        self._is_flat = False  # whether images are given without their nesting by example

    @property
    def image_token(self) -> int | None:
        """The token that stands for a part of an image, where the processor says it."""
        found = getattr(self._processor, "image_token_id", None)
        return found if isinstance(found, int) else None

    def render(self, messages: Messages, is_asked: bool) -> str:
        """Turns as text; `is_asked`: with the head of the answer to come."""
        text: str = self._processor.apply_chat_template(
            messages, add_generation_prompt=is_asked, tokenize=False
        )
        return text

    def tokens(self, text: str) -> list[int]:
        """The tokens of a text, one place for each image."""
        found: list[int] = self._processor.tokenizer(text, **self._special(text))["input_ids"]
        return found

    def batch(self, texts: Sequence[str], images: Sequence[list[Any]]) -> Mapping[str, Any]:
        """Texts and their images, padded on the right.

        Raises:
            CheckpointError: the processor refuses them.
        """
        given: dict[str, Any] = {"padding": True, "return_tensors": "pt"} | self._special(texts[0])
        nested = list(images)
        flat = [image for some in images for image in some]
        if not flat:
            return self._call(texts, given)
        # Some processors want a list for each text, some one list, and some either.
        first, second = (flat, nested) if self._is_flat else (nested, flat)
        try:
            return self._call(texts, given | {"images": first})
        except DriftMergeError as error:
            try:
                found = self._call(texts, given | {"images": second})
            except DriftMergeError:
                raise error from error.__cause__
            self._is_flat = not self._is_flat
            return found

    def _call(self, texts: Sequence[str], given: Mapping[str, Any]) -> Mapping[str, Any]:
        try:
            found: Mapping[str, Any] = self._processor(text=list(texts), **given)
        except Exception as error:  # processors raise whatever their parts raise
            raise CheckpointError(
                f"the model's processor refuses the conversation: {type(error).__name__}: {error}",
                remedy="Take the row out of the data; or, where it mixes rows with and without"
                " images, add --batch-size 1",
            ) from error
        return found

    def _special(self, text: str) -> dict[str, Any]:
        """Not a second beginning-of-text token, where the template has written one."""
        begin = getattr(self._processor.tokenizer, "bos_token", None)
        return {"add_special_tokens": False} if begin and text.startswith(begin) else {}
