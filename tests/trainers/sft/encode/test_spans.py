"""Only what an assistant says is learned, with its end, in several turns and any chat template."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from drift_merge.errors import CheckpointError
from drift_merge.trainers.sft.data.example import Example, Picture, Turn
from drift_merge.trainers.sft.encode.spans import render_with_spans
from tests.trainers.sft.encode.templates import TEMPLATES, renderer

PICTURE = Picture(None, b"x")


def conversation(*pairs, system=None, is_learned=None):
    turns = [] if system is None else [Turn("system", (system,), False)]
    for number, (asked, answer) in enumerate(pairs):
        learned = is_learned is None or is_learned[number]
        turns += [Turn("user", (PICTURE, asked), False), Turn("assistant", (answer,), learned)]
    return Example("data.jsonl, line 1", tuple(turns))


def learned(name, example):
    text, spans = render_with_spans(example, renderer(TEMPLATES[name][0]))
    return text, [text[begin:end] for begin, end in spans]


PAIRS = (("What is it?", "A cat."), ("And that, a cat?", "A dog.\nA big one."), ("Sure?", "A cat."))


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("system", [None, "Be brief."])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_every_answer_and_its_end_and_nothing_else(name, system, count):
    text, found = learned(name, conversation(*PAIRS[:count], system=system))
    end = TEMPLATES[name][1]
    wanted = [answer + end for _, answer in PAIRS[:count]]
    if name in ("vicuna", "idefics"):
        wanted = [" " + answer for answer in wanted]  # the head of an answer ends before a space
    elif name == "thoughts":
        wanted[-1] = "<think>\n\n</think>\n\n" + wanted[-1]
    elif name == "one end for all":
        wanted[-1] += "</s>"
    assert found == wanted
    assert text.count("A cat.") == sum(part.count("A cat.") for part in found)


@pytest.mark.parametrize("name", TEMPLATES)
def test_an_answer_that_is_not_to_be_learned_is_not(name):
    _, found = learned(name, conversation(*PAIRS, is_learned=(True, False, True)))
    assert [part.count("A cat.") for part in found] == [1, 1]
    assert not any("dog" in part for part in found)


def test_a_thought_that_the_template_leaves_out_is_not_looked_for():
    pairs = (("Q", "<think>\nlong\n</think>\n\nA"), ("R", "<think>\nshort\n</think>\n\nB"))
    _, found = learned("thoughts", conversation(*pairs))
    assert found == ["A<|im_end|>\n", "<think>\nshort\n</think>\n\nB<|im_end|>\n"]


WORDS = st.text(st.sampled_from("ab :\n<|>[]/sASISTNT"), min_size=1, max_size=12).filter(str.strip)


@settings(max_examples=40)
@given(
    st.sampled_from(sorted(TEMPLATES)),
    st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=3),
)
def test_spans_hold_their_answers_whatever_is_said(name, pairs):
    example = conversation(*pairs)
    text, spans = render_with_spans(example, renderer(TEMPLATES[name][0]))
    last = 0
    for (begin, end), (_, answer) in zip(spans, pairs, strict=True):
        assert last <= begin < end <= len(text)
        assert answer.strip() in text[begin:end]
        last = end


@pytest.mark.parametrize(
    "template",
    [
        "always this",
        "{% for m in messages if m['role'] == 'user' %}{{ m['content'][1]['text'] }}{% endfor %}",
        "{% for m in messages %}{% for _ in 'ab' %}{{ m['content'][-1]['text'] }}{% endfor %}"
        "{% endfor %}",
        "{{ raise_exception('no') }}",
        "{{ messages[9]['role'] + 1 }}",
    ],
)
def test_a_template_that_leaves_answers_out_or_refuses_is_named_with_the_line(template):
    with pytest.raises(CheckpointError, match=r"data\.jsonl, line 1: the .*template") as raised:
        render_with_spans(conversation(("Q", "A")), renderer(template))
    assert raised.value.remedy
