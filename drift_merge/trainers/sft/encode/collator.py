"""Examples to a batch with labels on the assistant's turns alone; each is encoded once."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from drift_merge.errors import CheckpointError, DriftMergeError, RecipeError
from drift_merge.trainers.sft.data.example import Example
from drift_merge.trainers.sft.data.pictures import open_picture
from drift_merge.trainers.sft.encode.places import Range, places_in, token_ranges
from drift_merge.trainers.sft.encode.processor import Encoder
from drift_merge.trainers.sft.encode.spans import render_with_spans

IGNORED = -100  # a label that the loss leaves out


class Collator:
    """Examples to a batch with labels."""

    def __init__(
        self,
        processor: Any,
        *,
        max_length: int | None = None,
        open_image: Callable[..., Any] = open_picture,
    ) -> None:
        """Keep the processor.

        Args:
            processor: of the MLLM.
            max_length: tokens, images included; what is longer loses the end of its answer.
            open_image: from a picture and where it is named to what the processor takes.
        """
        self._encoder, self.max_length = Encoder(processor), max_length
        self._open = open_image

    def __call__(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        """A batch, padded on the right; the keys are the processor's, and `labels`.

        Raises:
            SourceError: an image cannot be opened.
            CheckpointError: the template or the processor cannot render a conversation.
            RecipeError: `max_length` leaves nothing to learn, or would cut an image.
        """
        rendered = [render_with_spans(example, self._encoder.render) for example in examples]
        images = [[self._open(one, ex.where) for one in ex.pictures] for ex in examples]
        try:
            batch = dict(self._encoder.batch([text for text, _ in rendered], images))
        except DriftMergeError as error:
            first, last = examples[0].where, examples[-1].where
            where = first if len(examples) == 1 else f"{first} to {last}"
            raise CheckpointError(f"{where}: {error.message}", remedy=error.remedy) from error
        ids, mask = batch["input_ids"], batch["attention_mask"]
        labels = ids.new_full(ids.shape, IGNORED)
        for row, (example, (text, spans)) in enumerate(zip(examples, rendered, strict=True)):
            length = int(mask[row].sum())
            expanded, tokens = ids[row, :length].tolist(), self._encoder.tokens(text)
            ranges = token_ranges(text, spans, tokens, self._encoder.tokens)
            placed = places_in(expanded, tokens, ranges, example.where)
            self._require_room(expanded, tokens, placed, example.where)
            for begin, end in placed:
                labels[row, begin:end] = ids[row, begin:end]
        return self._cut(batch | {"labels": labels})

    def is_cut(self, batch: dict[str, Tensor]) -> bool:
        """Whether a batch may have lost the ends of answers."""
        return batch["labels"].shape[1] == self.max_length

    def _cut(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        shape = batch["labels"].shape
        if self.max_length is None or shape[1] <= self.max_length:
            return batch
        return {
            key: value[:, : self.max_length] if value.shape[:2] == shape else value
            for key, value in batch.items()
        }

    def _require_room(
        self, expanded: list[int], tokens: list[int], placed: list[Range], where: str
    ) -> None:
        """Refuse to cut through an image, or all of an answer."""
        limit, length = self.max_length, len(expanded)
        if limit is None or length <= limit:
            return
        rest = expanded[limit:]
        is_image_cut = self._encoder.image_token in rest or rest != tokens[-len(rest) :]
        if is_image_cut or placed[0][0] >= limit:
            what = "an image" if is_image_cut else "every answer"
            raise RecipeError(
                f"{where}: of its {length:,} tokens, --max-length {limit:,} would cut {what} off.",
                remedy=f"Raise it, e.g. --max-length {length}, make the images smaller, or take"
                " the row out of the data.",
            )
