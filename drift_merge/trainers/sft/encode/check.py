"""Checks of all examples before the first step, so that no run ends at the one that is wrong."""

import warnings
from collections.abc import Sequence
from typing import Any

from drift_merge.trainers.sft.data.example import Example
from drift_merge.trainers.sft.encode.collator import Collator
from drift_merge.trainers.sft.encode.processor import Encoder
from drift_merge.trainers.sft.encode.spans import render_with_spans


def check_conversations(examples: Sequence[Example], processor: Any) -> None:
    """Render every conversation, and warn if answers have no end that could be learned.

    Raises:
        CheckpointError: the template refuses one, or leaves its answers out.
    """
    encoder, end = Encoder(processor), getattr(processor.tokenizer, "eos_token", None)
    special = {str(one) for one in getattr(processor.tokenizer, "all_special_tokens", [])}
    num_open = 0
    for example in examples:
        text, spans = render_with_spans(example, encoder.render)
        last = text[slice(*spans[-1])].rstrip()
        num_open += not any(last.endswith(token) for token in special | {str(end)})
    if num_open:
        warnings.warn(
            f"{num_open:,} of {len(examples):,} conversations end without a special token in the"
            " model's chat template: what is trained will not learn to end its answers. Such"
            f" templates take the end as text: write {end} at the end of the answers.",
            stacklevel=2,
        )


def check_lengths(examples: Any, collator: Collator, num_workers: int) -> None:
    """Encode every example once, and warn of those that --max-length cuts.

    Raises:
        RecipeError: one would lose an image or all of its answers.
    """
    from torch.utils.data import DataLoader

    loader: Any = DataLoader(examples, 1, collate_fn=collator, num_workers=num_workers)
    num_cut = sum(collator.is_cut(batch) for batch in loader)
    if num_cut:
        warnings.warn(
            f"{num_cut:,} of {len(examples):,} examples have {collator.max_length:,} tokens or more"
            " and are cut there (--max-length).",
            stacklevel=2,
        )
