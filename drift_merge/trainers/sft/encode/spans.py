"""Which characters of a rendered conversation an assistant says.

Found by rendering, for any chat template: the template is a function from turns to text, and
nothing is assumed of it but that a turn's words are within what it renders.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

from drift_merge.errors import CheckpointError
from drift_merge.trainers.sft.data.example import Example, Picture, Turn
from drift_merge.trainers.sft.encode.places import shared

Messages = list[dict[str, Any]]
Render = Callable[[Messages, bool], str]  # turns, whether the head of an answer follows
_MARK = "answerstandshere7c1e"  # no template changes it, no conversation holds it
_REMEDY = "Use a template that renders the assistant's turns as they are, or take such rows out."


def messages_of(turns: Sequence[Turn]) -> Messages:
    """Turns as chat templates of processors take them."""
    return [
        {
            "role": turn.role,
            "content": [
                {"type": "image"} if isinstance(part, Picture) else {"type": "text", "text": part}
                for part in turn.parts
            ],
        }
        for turn in turns
    ]


def render_with_spans(example: Example, render: Render) -> tuple[str, list[tuple[int, int]]]:
    """The conversation as text, and where its answers are.

    A span begins after the head that is written for an answer to come, and ends with what ends
    the turn (`<|im_end|>`, `</s>`), so that both the answer and its end are learned.

    Raises:
        CheckpointError: the template refuses the conversation, or leaves answers out.
    """

    def rendered(messages: Messages, is_asked: bool = False) -> str:
        try:
            return render(messages, is_asked)
        except Exception as error:  # Jinja's errors, and those that templates raise
            raise CheckpointError(
                f"{example.where}: the model's chat template refuses the conversation: {error}",
                remedy=_REMEDY,
            ) from error

    messages = messages_of(example.turns)
    text = rendered(messages)
    spans = []
    for number, turn in enumerate(example.turns):
        if turn.is_learned:
            spans.append(_span(text, messages, number, rendered, example.where))
    if any(begin < end for (_, end), (begin, _) in pairwise(spans)):
        raise _left_out(example.where)
    return text, spans


def _span(
    text: str, messages: Messages, number: int, rendered: Callable[..., str], where: str
) -> tuple[int, int]:
    marked = [dict(message) for message in messages]
    marked[number]["content"] = [{"type": "text", "text": _MARK}]
    around = rendered(marked).split(_MARK)
    until = rendered(marked[: number + 1]).split(_MARK)
    if len(around) != 2 or len(until) != 2:
        raise _left_out(where)
    before, after = around
    if not text.endswith(after):
        raise _left_out(where)
    head = rendered(messages[:number], True) if number else ""
    # A template may write more before an answer than it writes for an answer to come, or less.
    begin = len(head) if head and text.startswith(head) else shared(before, text)
    end = len(text) - len(after) + shared(after, until[1])
    if begin >= len(text) - len(after):
        raise _left_out(where)
    return begin, end


def _left_out(where: str) -> CheckpointError:
    return CheckpointError(
        f"{where}: the chat template leaves the answer out, or writes it so that its place is not"
        " to be found.",
        remedy=_REMEDY,
    )
