"""The forms that a row may have: ours, LLaVA's and ShareGPT's conversations, messages, prompts.

A row becomes turns of text with images in their places. What would change the meaning and is not
understood is refused: videos, tools, preference pairs.

Sources: the data formats in the documentation of LLaVA, Qwen's qwen-vl-finetune, LLaMA-Factory
(sharegpt with images), ms-swift (messages, images, loss) and TRL (messages, prompt, completion).
"""

import base64
import binascii
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from drift_merge.trainers.sft.data.example import Example, Picture, Turn, wrong

TAG = "<image>"
ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
}
_REFUSED = (
    *("video", "videos", "audio", "audios", "tools", "objects", "history"),
    *("chosen", "rejected", "rejected_response", "rejected_messages"),
)
_TURNS = ("messages", "conversations", "conversation")
USED = ("image", "images", "question", "answer", "system", "prompt", "completion", *_TURNS)
_MESSAGE_KEYS = {"role", "from", "content", "value", "loss", "weight", "train"}
_MARK = Picture(None, None)  # the place of an image that the row lists beside its turns
_LEARNED_KEYS = ("loss", "weight", "train")  # of swift, of OpenAI's form, of Axolotl's


def read_row(row: Any, where: str, folder: Path) -> Example:
    """Understand one row.

    Args:
        row: an object of one of the forms.
        where: file and line.
        folder: what paths of images are relative to.

    Raises:
        RecipeError: it has none of the forms, or says what cannot be learned here.
    """
    if not isinstance(row, Mapping):
        raise wrong(where, "this is not an object.")
    given = {key: value for key, value in row.items() if not _is_empty(value)}
    for key in _REFUSED:
        if key in given:
            raise wrong(where, f"{key!r} is not understood.", "Take such rows out of the data.")
    reader = _Reader(where, folder, given)
    turns = _place(reader.turns(), reader.images(), where)
    if not any(turn.is_learned for turn in turns):
        raise wrong(where, "no turn of an assistant is to be learned.")
    return Example(where, tuple(turns))


class _Reader:
    """The fields of one row."""

    def __init__(self, where: str, folder: Path, row: Mapping[str, Any]) -> None:
        self._where, self._folder, self._row = where, folder, row

    def turns(self) -> list[Turn]:
        row = self._row
        found = [key for key in _TURNS if key in row]
        if "question" in row or "answer" in row:
            found.append("question")
        if "prompt" in row or "completion" in row:
            found.append("prompt")
        if len(found) != 1:
            what = f"{' and '.join(found)} exclude each other." if found else self._missing()
            raise wrong(self._where, what)
        if found == ["question"]:
            turns = self._question()
        elif found == ["prompt"]:
            turns = self._prompt()
        else:
            turns = self._messages(row[found[0]])
        if "system" in row:
            turns = [Turn("system", (self._text("system"),), is_learned=False), *turns]
        return turns

    def _missing(self) -> str:
        keys = ", ".join(map(repr, self._row)) or "nothing"
        return f"there is neither 'question' and 'answer' nor 'messages'; it has {keys}."

    def _question(self) -> list[Turn]:
        absent = [key for key in ("question", "answer") if not self._is_text(key)]
        if absent:
            verb = "are" if absent[1:] else "is"
            raise wrong(self._where, f"{' and '.join(absent)} {verb} missing or no text.")
        return [
            Turn("user", _split(self._text("question")), is_learned=False),
            Turn("assistant", (self._text("answer"),), is_learned=True),
        ]

    def _prompt(self) -> list[Turn]:
        sides = []
        for key, role in (("prompt", "user"), ("completion", "assistant")):
            value = self._row.get(key)
            if isinstance(value, str):
                value = [{"role": role, "content": value}]
            if value is None:
                raise wrong(self._where, f"{key} is missing.")
            sides.append(self._messages(value))
        told = [Turn(turn.role, turn.parts, is_learned=False) for turn in sides[0]]
        return [*told, *sides[1]]

    def _messages(self, messages: Any) -> list[Turn]:
        if not isinstance(messages, Sequence) or isinstance(messages, str):
            raise wrong(self._where, "the turns are not a list.")
        return [self._turn(message, number) for number, message in enumerate(messages, 1)]

    def _turn(self, message: Any, number: int) -> Turn:
        at = f"{self._where}, turn {number}"
        if not isinstance(message, Mapping):
            raise wrong(at, "this is not an object with a role.")
        said = {key: value for key, value in message.items() if not _is_empty(value)}
        unknown = sorted(said.keys() - _MESSAGE_KEYS)
        if unknown:
            raise wrong(at, f"{unknown[0]!r} is not understood.", "Take such rows out.")
        role = ROLES.get(str(said.get("role", said.get("from"))))
        if role is None:
            known = ", ".join(ROLES)
            raise wrong(at, f"the role is {said.get('role', said.get('from'))!r}; known: {known}.")
        parts = self._parts(said.get("content", said.get("value")), at)
        is_learned = role == "assistant" and all(
            bool(float(message[key])) for key in _LEARNED_KEYS if message.get(key) is not None
        )
        if role == "assistant":
            if any(isinstance(part, Picture) for part in parts):
                raise wrong(at, "an assistant's turn holds an image.", "Take such rows out.")
            is_blank = not "".join(part for part in parts if isinstance(part, str)).strip()
            if is_learned and is_blank:
                raise wrong(at, "the answer is empty.")
        return Turn(role, parts, is_learned=is_learned)

    def _parts(self, content: Any, at: str) -> tuple[str | Picture, ...]:
        if isinstance(content, str):
            return _split(content)
        if content is None or not isinstance(content, Sequence):
            raise wrong(at, "it has no text.")
        return tuple(found for part in content for found in self._part(part, at))

    def _part(self, part: Any, at: str) -> Iterable[str | Picture]:
        if isinstance(part, str):
            return _split(part)
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "text":
            # In a list of parts, images have parts of their own: a tag is not split off again.
            return (str(part.get("text") or ""),)
        if kind in ("image", "image_url"):
            keys = ("image", "image_url", "url", "path", "base64", "bytes")
            given = [part[key] for key in keys if not _is_empty(part.get(key))]
            return (self._picture(given[0]) if given else _MARK,)
        raise wrong(at, f"a part of type {kind!r} is not understood.", "Take such rows out.")

    def images(self) -> list[Picture]:
        """Those that the row lists beside its turns."""
        found = []
        for key in ("image", "images"):
            value = self._row.get(key, [])
            many = isinstance(value, Sequence) and not isinstance(value, str | bytes)
            found += [self._picture(one) for one in (value if many else [value])]
        return found

    def _picture(self, given: Any) -> Picture:
        if isinstance(given, Mapping):  # of the datasets library, or of image_url
            inner = given.get("bytes") or given.get("path") or given.get("url")
            return self._picture(inner)
        if isinstance(given, bytes):
            return Picture(None, given)
        if not isinstance(given, str):
            raise wrong(self._where, f"an image is given as {type(given).__name__}.")
        if given.startswith("data:"):
            return Picture(None, self._decode(given))
        if re.match(r"https?://", given):
            raise wrong(
                self._where,
                f"the image {given} is on the web.",
                "Download the images, and give paths relative to the data.",
            )
        return Picture(self._folder / given.removeprefix("file://"))

    def _decode(self, given: str) -> bytes:
        try:
            return base64.b64decode(given.partition("base64,")[2], validate=True)
        except binascii.Error as error:
            raise wrong(self._where, f"an image is no base64: {error}.") from error

    def _is_text(self, key: str) -> bool:
        return isinstance(self._row.get(key), str) and bool(self._row[key].strip())

    def _text(self, key: str) -> str:
        if not self._is_text(key):
            raise wrong(self._where, f"{key} is missing or no text.")
        return str(self._row[key])


def _is_empty(value: Any) -> bool:
    return value is None or (isinstance(value, str | bytes | Sequence | Mapping) and not value)


def _split(text: str) -> tuple[str | Picture, ...]:
    """Text around `<image>` tags; white space beside a tag is the template's business."""
    pieces = text.split(TAG)
    if len(pieces) == 1:
        return (text,)
    found: list[str | Picture] = []
    for number, piece in enumerate(pieces):
        trimmed = piece.lstrip() if number else piece
        trimmed = trimmed.rstrip() if number < len(pieces) - 1 else trimmed
        found += [trimmed] if trimmed else []
        found += [_MARK] if number < len(pieces) - 1 else []
    return tuple(found)


def _place(turns: list[Turn], images: list[Picture], where: str) -> list[Turn]:
    """Put the images that a row lists where its turns have tags; without tags, before all."""
    tags = sum(part is _MARK for turn in turns for part in turn.parts)
    inline = any(type(part) is Picture and part is not _MARK for t in turns for part in t.parts)
    if tags == 0 and images and not inline:
        first = next((n for n, turn in enumerate(turns) if turn.role == "user"), None)
        if first is None:
            raise wrong(where, "there are images, but no turn of a user.")
        asked = turns[first]
        turns[first] = Turn(asked.role, (*images, *asked.parts), is_learned=False)
        return turns
    if tags != len(images):
        raise wrong(
            where,
            f"the turns have {tags:,} places for images ({TAG}), and there are"
            f" {len(images):,} images.",
            f"Write {TAG} once for each image, or not at all: then images come first.",
        )
    waiting = iter(images)
    return [
        Turn(
            turn.role,
            tuple(next(waiting) if part is _MARK else part for part in turn.parts),
            is_learned=turn.is_learned,
        )
        for turn in turns
    ]
