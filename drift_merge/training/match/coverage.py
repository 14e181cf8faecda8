"""What became of the tensors that were selected for training."""

from collections.abc import Sequence
from dataclasses import dataclass

_FEW = 3  # names shown in a message
_WORDS = {
    "frozen": "frozen",
    "buffers": "buffers, never trained",
    "tied": "tied",
    "inserted": "of the mllm alone, left as they are",
    "by_value": "paired by their values",
    "unmatched": "unmatched",
}


@dataclass(frozen=True, slots=True)
class Coverage:
    """What became of the selected tensors, in canonical names unless said otherwise."""

    selected: int  # tensors that modules and layers select, in the prior or only in the model
    matched: int  # of them, those with a partner; frozen, tied ones and buffers included
    units: int  # pieces of parameters that will be biased
    elements: int  # their elements
    frozen: tuple[str, ...]  # parameters that match but require no gradient; names in memory
    buffers: tuple[str, ...]  # in the model's state, but no parameters; names in memory
    tied: tuple[str, ...]  # further names of a parameter that is biased once, under its first
    inserted: tuple[str, ...]  # modules that the mllm adds to its layers; names in memory
    by_value: tuple[str, ...]  # whose partner has another name, and the values recorded
    unmatched: tuple[str, ...]  # without a partner

    def text(self) -> str:
        """One line for a log."""
        parts = [
            f"{self.matched:,} of {self.selected:,} selected tensors matched,"
            f" {self.elements:,} elements biased"
        ]
        for field, words in _WORDS.items():
            if names := getattr(self, field):
                parts.append(f"{len(names):,} {words} ({some(names)})")
        return "; ".join(parts)


def some(names: Sequence[str]) -> str:
    """The first few names, for a message."""
    return ", ".join(names[:_FEW]) + (", ..." if len(names) > _FEW else "")
