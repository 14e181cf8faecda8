"""What the answers of a checkpoint say of its health, beside those of the unmerged MLLM.

Numbers that cost seconds, as the papers count them: repetition and capped answers ("Selective
Transfer of RL Updates", 2026), a missing </think> (RAIN-Merging, arXiv 2602.22538, table on the
thinking format).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

SOUND, SUSPICIOUS, BROKEN = "sound", "suspicious", "broken"
NGRAM, REPEATED = 4, 0.5  # an answer repeats itself if half of its 4-grams have occurred before
FAR, ABSURD = 2.0, 10.0  # times the perplexity of the unmerged MLLM
_THINK, _END = "<think>", "</think>"

CANNOT_SEE = (
    "It cannot see whether answers are right, what happens in answers longer than the limit, nor "
    "anything of other pictures, languages and prompts: evaluate it (drift-merge guide evaluation)."
)


@dataclass(frozen=True, slots=True)
class Health:
    """What was counted of one checkpoint."""

    num_answers: int
    num_pictures: int  # answers to prompts with a picture
    perplexity: float | None  # None: not finite, or not measured
    was_measured: bool  # whether there was a tokenizer to measure it with
    empty: int
    capped: int
    repeating: int
    unclosed: int  # a <think> without its </think>
    missing_keys: tuple[str, ...]
    unexpected_keys: tuple[str, ...]

    def as_data(self) -> dict[str, Any]:
        """For `--json`."""
        found = {name: getattr(self, name) for name in self.__slots__}
        return found | {name: list(found[name]) for name in ("missing_keys", "unexpected_keys")}


def health_of(probed: Mapping[str, Any]) -> Health:
    """Count what the child has reported."""
    answers, loading = probed["answers"], probed["loading"]
    return Health(
        num_answers=len(answers),
        num_pictures=sum(answer["has_picture"] for answer in answers),
        perplexity=probed["perplexity"],
        was_measured=bool(answers) or probed["perplexity"] is not None,
        empty=sum(not answer["text"] for answer in answers),
        capped=sum(answer["is_capped"] for answer in answers),
        repeating=sum(repetition(answer["tokens"]) >= REPEATED for answer in answers),
        unclosed=sum(is_unclosed(answer["raw"]) for answer in answers),
        missing_keys=(*loading["missing_keys"], *loading["mismatched_keys"]),
        unexpected_keys=tuple(loading["unexpected_keys"]),
    )


def repetition(tokens: Sequence[int], size: int = NGRAM) -> float:
    """The share of n-grams that have occurred before; 0 of fewer than three times n tokens."""
    if len(tokens) < 3 * size:
        return 0.0
    grams = [tuple(tokens[i : i + size]) for i in range(len(tokens) - size + 1)]
    return 1.0 - len(set(grams)) / len(grams)


def is_unclosed(raw: str) -> bool:
    """Whether thinking begins, in the answer or at the end of the prompt, and does not end.

    Args:
        raw: the last tokens of the prompt, a NUL, and the answer, special tokens included.
    """
    prompt, _, answer = raw.partition("\0")
    starts = prompt.rstrip().endswith(_THINK) or _THINK in answer
    return starts and _END not in answer.rpartition(_THINK)[2]


def verdict(own: Health, other: Health | None) -> tuple[str, list[str]]:
    """SOUND, SUSPICIOUS or BROKEN, and why, a clause each.

    Args:
        own: of the checkpoint.
        other: of the unmerged MLLM; None if it was not looked at.
    """
    broken = _broken(own, other)
    if broken:
        return BROKEN, broken
    odd = _odd(own, other)
    return (SUSPICIOUS, odd) if odd else (SOUND, [])


def _broken(own: Health, other: Health | None) -> list[str]:
    found = []
    known = other.missing_keys if other is not None else ()
    missing = [key for key in own.missing_keys if key not in known]
    if missing:
        found.append(f"{len(missing):,} parameter(s) missing or misshapen, e.g. {missing[0]}")
    if own.was_measured and own.perplexity is None:
        found.append("its perplexity is not finite")
    ratio = _ratio(own, other)
    if ratio is not None and ratio >= ABSURD:
        found.append(f"its perplexity is {ratio:.3g} times the unmerged MLLM's")
    if (
        own.num_answers
        and own.empty == own.num_answers
        and not (other and other.empty == own.empty)
    ):
        found.append("every answer is empty")
    return found


def _odd(own: Health, other: Health | None) -> list[str]:
    found = []
    ratio = _ratio(own, other)
    if ratio is not None and ratio >= FAR:
        found.append(f"its perplexity is {ratio:.3g} times the unmerged MLLM's")
    words = {
        "empty": "empty",
        "capped": "longer than the limit",
        "repeating": "going round in circles",
        "unclosed": "without a </think>",
    }
    for name, word in words.items():
        count, known = getattr(own, name), 0 if other is None else getattr(other, name)
        if count > known:
            than = "" if other is None else f", of the unmerged MLLM {known}"
            found.append(f"{count} of {own.num_answers} answers are {word}{than}")
    return found


def _ratio(own: Health, other: Health | None) -> float | None:
    if other is None or own.perplexity is None or not other.perplexity:
        return None
    return own.perplexity / other.perplexity
