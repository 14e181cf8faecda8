"""What is counted of answers, and the verdict."""

import pytest

from drift_merge.evaluation.health import (
    BROKEN,
    SOUND,
    SUSPICIOUS,
    health_of,
    is_unclosed,
    repetition,
    verdict,
)


def answer(text="A cat.", tokens=range(20), raw="\0A cat.", capped=False, picture=False):
    return {
        "text": text,
        "tokens": list(tokens),
        "raw": raw,
        "is_capped": capped,
        "has_picture": picture,
    }


def health(*answers, perplexity=10.0, missing=()):
    keys = {"missing_keys": list(missing), "unexpected_keys": [], "mismatched_keys": []}
    answers = answers or (answer(), answer(picture=True))
    return health_of({"answers": answers, "loading": keys, "perplexity": perplexity})


@pytest.mark.parametrize(
    ("tokens", "share"),
    [([1, 2, 3, 4] * 6, 1 - 4 / 21), (range(24), 0.0), ([7] * 30, 1 - 1 / 27), ([7] * 11, 0.0)],
)
def test_repetition_is_the_share_of_four_grams_seen_before(tokens, share):
    assert repetition(list(tokens)) == pytest.approx(share)


@pytest.mark.parametrize(
    ("raw", "is_open"),
    [
        ("user\0<think>so", True),
        ("user\0<think>so</think>4", False),
        ("user<think>\n\0so", True),
        ("user<think>\n\0so</think>4", False),
        ("user\0plain", False),
        ("user\0<think>a</think><think>b", True),
    ],
)
def test_a_thought_that_is_begun_must_be_ended(raw, is_open):
    assert is_unclosed(raw) is is_open


def test_a_merge_like_its_mllm_is_sound():
    assert verdict(health(), health()) == (SOUND, [])
    assert verdict(health(), None) == (SOUND, [])


@pytest.mark.parametrize(
    ("own", "reason"),
    [
        (health(missing=["a.weight"]), "1 parameter(s) missing"),
        (health(perplexity=None), "not finite"),
        (health(perplexity=100.0), "10 times"),
        (health(answer(text=""), answer(text="")), "every answer is empty"),
    ],
)
def test_what_is_broken(own, reason):
    word, reasons = verdict(own, health())
    assert word == BROKEN
    assert reason in reasons[0]


@pytest.mark.parametrize(
    ("own", "reason"),
    [
        (health(perplexity=25.0), "2.5 times"),
        (health(answer(), answer(text="")), "1 of 2 answers are empty, of the unmerged MLLM 0"),
        (health(answer(), answer(capped=True)), "longer than the limit"),
        (health(answer(), answer(tokens=[3] * 40)), "going round"),
        (health(answer(), answer(raw="\0<think>hm")), "without a </think>"),
    ],
)
def test_what_is_suspicious(own, reason):
    word, reasons = verdict(own, health())
    assert word == SUSPICIOUS
    assert reason in reasons[0]


def test_what_the_mllm_does_too_is_no_fault_of_the_merge():
    odd = health(answer(capped=True), answer(raw="\0<think>"), missing=["rope.inv_freq"])
    assert verdict(odd, odd) == (SOUND, [])
