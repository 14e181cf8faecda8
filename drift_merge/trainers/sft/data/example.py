"""One conversation to learn from, whatever form it was written in."""

from dataclasses import dataclass
from pathlib import Path

from drift_merge.errors import RecipeError

FORMS = """One of these forms, as JSON Lines, a JSON list, Parquet or a folder of a data set:
  {"image": "1.png", "question": "...", "answer": "..."}      (without an image: text alone)
  {"image": "1.png", "conversations": [{"from": "human", "value": "<image>\\n..."},
   {"from": "gpt", "value": "..."}]}
  {"messages": [{"role": "user", "content": "<image>..."},
   {"role": "assistant", "content": "..."}], "images": ["1.png"]}"""


@dataclass(frozen=True, slots=True)
class Picture:
    """Where an image is: a file, or bytes within the data."""

    path: Path | None
    content: bytes | None = None

    @property
    def label(self) -> str:
        """What an error calls it."""
        return str(self.path) if self.path is not None else "an image within the data"


@dataclass(frozen=True, slots=True)
class Turn:
    """What one side says: texts, and images in their places."""

    role: str  # system, user or assistant
    parts: tuple[str | Picture, ...]
    is_learned: bool  # an assistant's turn, unless the data say otherwise

    @property
    def text(self) -> str:
        """The texts alone."""
        return "".join(part for part in self.parts if isinstance(part, str))


@dataclass(frozen=True, slots=True)
class Example:
    """One row of the data."""

    where: str  # file and line, for errors
    turns: tuple[Turn, ...]

    @property
    def pictures(self) -> tuple[Picture, ...]:
        """All images, in the order of the conversation."""
        return tuple(part for turn in self.turns for part in turn.parts if type(part) is Picture)


def wrong(where: str, what: str, remedy: str = FORMS) -> RecipeError:
    """The error for a row that cannot be learned from."""
    return RecipeError(f"{where}: {what}", remedy=remedy)
