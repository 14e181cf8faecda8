"""Every form of a row becomes the same turns; what is not understood is refused by name."""

import base64
from pathlib import Path

import pytest

from drift_merge.errors import RecipeError
from drift_merge.trainers.sft.data.example import Picture
from drift_merge.trainers.sft.data.forms import read_row
from tests.trainers.sft.pictures import png

HERE = Path("data")


def told(row):
    """Role, parts, learned; images by their path."""
    return [
        (
            turn.role,
            [str(part.path) if isinstance(part, Picture) else part for part in turn.parts],
            turn.is_learned,
        )
        for turn in read_row(row, "data.jsonl, line 1", HERE).turns
    ]


ASKED = ("user", ["data/1.png", "What?"], False)
ANSWERED = ("assistant", ["A cat."], True)
SAID = {"role": "assistant", "content": "A cat."}
TYPED = [{"type": "image"}, {"type": "text", "text": "What?"}]
SAME = {
    "ours": {"image": "1.png", "question": "What?", "answer": "A cat."},
    "ours with a tag": {"image": "1.png", "question": "<image> What?", "answer": "A cat."},
    "llava": {
        "id": "7",
        "image": "1.png",
        "conversations": [
            {"from": "human", "value": "<image>\nWhat?"},
            {"from": "gpt", "value": "A cat."},
        ],
    },
    "qwen-vl-finetune": {
        "image": ["1.png"],
        "conversations": [
            {"from": "human", "value": "<image>\nWhat?"},
            {"from": "gpt", "value": "A cat."},
        ],
    },
    "llama-factory": {
        "messages": [{"role": "user", "content": "<image>What?"}, SAID],
        "images": ["1.png"],
    },
    "swift": {
        "messages": [{"role": "user", "content": "<image>What?"}, SAID | {"loss": True}],
        "images": [{"path": "1.png", "bytes": None}],
        "videos": [],
    },
    "swift without a tag": {
        "messages": [{"role": "user", "content": "What?"}, SAID],
        "images": ["1.png"],
    },
    "trl": {"messages": [{"role": "user", "content": TYPED}, SAID], "images": ["1.png"]},
    "trl, as Arrow fills it": {
        "messages": [
            {"role": "user", "content": [{"type": "image", "text": None}, TYPED[1]]},
            {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]},
        ],
        "images": [{"bytes": None, "path": "1.png"}],
    },
    "prompt and completion": {
        "prompt": [{"role": "user", "content": TYPED}],
        "completion": [SAID],
        "images": ["1.png"],
    },
    "in its place": {
        "messages": [
            {"role": "user", "content": [{"type": "image", "image": "1.png"}, TYPED[1]]},
            SAID,
        ]
    },
    "as a url of a file": {
        "messages": [
            {
                "role": "user",
                "content": [{"type": "image_url", "image_url": {"url": "1.png"}}, TYPED[1]],
            },
            SAID,
        ]
    },
}


@pytest.mark.parametrize("name", SAME)
def test_one_conversation_in_every_form(name):
    assert told(SAME[name]) == [ASKED, ANSWERED]


def test_several_turns_and_images_stand_where_their_tags_are():
    row = {
        "system": "Be brief.",
        "images": ["1.png", "2.png", "3.png"],
        "conversations": [
            {"from": "human", "value": "<image> and <image>\nCompare."},
            {"from": "gpt", "value": "Equal."},
            {"from": "human", "value": "With this?\n<image>"},
            {"from": "gpt", "value": "Larger."},
        ],
    }
    assert told(row) == [
        ("system", ["Be brief."], False),
        ("user", ["data/1.png", "and", "data/2.png", "Compare."], False),
        ("assistant", ["Equal."], True),
        ("user", ["With this?", "data/3.png"], False),
        ("assistant", ["Larger."], True),
    ]


def test_text_alone_needs_no_image():
    row = {"question": "2 + 2?", "answer": "4"}
    assert told(row) == [("user", ["2 + 2?"], False), ("assistant", ["4"], True)]


@pytest.mark.parametrize("key", ["loss", "weight", "train"])
def test_a_turn_that_the_data_leave_out_is_not_learned(key):
    asked = {"role": "user", "content": "?"}
    row = {"messages": [asked, SAID | {key: 0}, asked, SAID | {key: 1}]}
    assert [turn[2] for turn in told(row)] == [False, False, False, True]


def test_an_assistants_turns_in_a_prompt_are_not_learned():
    asked = {"role": "user", "content": "?"}
    row = {"prompt": [asked, SAID, asked], "completion": [SAID]}
    assert [turn[2] for turn in told(row)] == [False, False, False, True]


def test_bytes_within_the_data_are_images():
    url = "data:image/png;base64," + base64.b64encode(png()).decode()
    for given in (png(), {"bytes": png(), "path": "1.png"}, url):
        row = {"images": [given], "question": "What?", "answer": "A."}
        (picture,) = read_row(row, "", HERE).pictures
        assert (picture.path, picture.content) == (None, png())


ASK = {"role": "user", "content": "?"}
BAD = {
    "no list": ([], "not an object"),
    "nothing known": ({"text": "x"}, "it has 'text'"),
    "two forms": ({"messages": [ASK, SAID], "question": "?", "answer": "!"}, "exclude each other"),
    "answer is missing": ({"image": "1.png", "question": "?"}, "answer is missing or no text"),
    "blank": ({"question": " ", "answer": "!"}, "question is missing"),
    "one image too many": (
        {"images": ["1.png", "2.png"], "messages": [ASK | {"content": "<image>?"}, SAID]},
        r"1 places for images \(<image>\), and there are 2 images",
    ),
    "no image": ({"messages": [ASK | {"content": "<image>?"}, SAID]}, "1 places .* 0 images"),
    "nobody answers": ({"messages": [ASK]}, "no turn of an assistant is to be learned"),
    "nothing is learned": ({"messages": [ASK, SAID | {"loss": False}]}, "is to be learned"),
    "an empty answer": (
        {"messages": [ASK, SAID | {"content": " "}]},
        "turn 2: the answer is empty",
    ),
    "no text": (
        {"messages": [ASK, {"role": "assistant", "content": None}]},
        "turn 2: it has no te",
    ),
    "a role": ({"messages": [ASK, {"role": "tool", "content": "1"}, SAID]}, "role is 'tool'"),
    "calls": ({"messages": [ASK, SAID | {"tool_calls": [1]}]}, "'tool_calls' is not understood"),
    "a video": ({"messages": [ASK, SAID], "videos": ["v.mp4"]}, "'videos' is not understood"),
    "tools": ({"messages": [ASK, SAID], "tools": "[...]"}, "'tools' is not understood"),
    "a pair": ({"prompt": "?", "chosen": "!", "rejected": "."}, "'chosen' is not understood"),
    "a part": (
        {"messages": [{"role": "user", "content": [{"type": "video"}]}, SAID]},
        "a part of type 'video'",
    ),
    "drawn by the assistant": (
        {"messages": [ASK, SAID | {"content": "<image>"}], "images": ["1.png"]},
        "an assistant's turn holds an image",
    ),
    "the web": ({"image": "https://x/1.png", "question": "?", "answer": "!"}, "is on the web"),
    "no base64": ({"image": "data:;base64,!", "question": "?", "answer": "!"}, "no base64"),
    "turns that are text": ({"messages": "hello"}, "the turns are not a list"),
    "a turn that is text": ({"messages": ["hello"]}, "turn 1: this is not an object"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_learned_from_is_refused_by_line_and_reason(name):
    row, words = BAD[name]
    with pytest.raises(RecipeError, match=words) as raised:
        read_row(row, "data.jsonl, line 3", HERE)
    assert raised.value.message.startswith("data.jsonl, line 3")
    assert raised.value.remedy
