"""The manual: one topic a file, Markdown, shown by `drift-merge guide TOPIC`.

Every topic is package data; its first sentence says what it is for. Knows nothing of commands,
terminals or how a text is drawn.
"""

import re
from pathlib import Path

from drift_merge.errors import RecipeError, nearest

_FOLDER = Path(__file__).parent
_FIRST_SENTENCE = re.compile(r"# [^\n]+\n\n(.+?\.)\s", re.DOTALL)


def topics() -> list[str]:
    """The names of all guides, in the order of the alphabet."""
    return sorted(path.stem for path in _FOLDER.glob("*.md"))


def text_of(topic: str) -> str:
    """A guide as Markdown.

    Raises:
        RecipeError: there is none of that name; the nearest is named.
    """
    if topic not in topics():
        raise RecipeError(
            f"there is no guide {topic!r}.{nearest(topic, topics())}",
            remedy=f"Topics: {', '.join(topics())}.",
        )
    return (_FOLDER / f"{topic}.md").read_text(encoding="utf-8")


def first_sentence(topic: str) -> str:
    """What a guide is for, in one line."""
    found = _FIRST_SENTENCE.match(text_of(topic))
    assert found is not None, topic
    return " ".join(found[1].split())
