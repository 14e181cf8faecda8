"""The program that evaluates: its words, its end, and what is left of it."""

import os
import shlex
import sys
import time
from pathlib import Path

import pytest

from drift_merge.errors import EvaluationError, RecipeError
from drift_merge.evaluation.command import command_of


def python(code, *words):
    return shlex.join([sys.executable, "-S", "-c", code, *words])


def run(text, tmp_path, *metrics, items=(), timeout=None, limit="all"):
    command = command_of(text, metrics, items, timeout_seconds=timeout)
    return command.run("a model", limit=limit, out=tmp_path / "out", label="trial-3")


def test_places_are_filled_in_as_whole_words_and_other_braces_stay(tmp_path):
    command = command_of('prog "{model}" --out={out} {trial} {limit} \'{"a": {x}}\'', ())
    assert command.words("a model", "100", Path("o"), "trial-3") == [
        *("prog", "a model", "--out=o", "trial-3", "100", '{"a": {x}}')
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("p {model} --limit {limit} x", ["p", "m", "x"]),
        ("p {model} --limit={limit} x", ["p", "m", "x"]),
        ("p {model} {limit}", ["p", "m", "all"]),
    ],
)
def test_the_limit_all_leaves_its_option_out(text, expected):
    assert command_of(text, ()).words("m", "all", Path("o"), "t") == expected


def test_scores_and_items_are_read_and_what_was_printed_is_kept(tmp_path):
    code = (
        "import sys, json; open(sys.argv[2] + '/s.json', 'w').write(json.dumps("
        "{'acc': 0.5, 'right': {'a': 1, 'b': 0}})); print(sys.argv[1], 7)"
    )
    text = python(code, "{model}", "{out}")
    found = run(text, tmp_path, "acc=s.json:acc", "n=stdout", items=("acc=s.json:right",))
    assert found.values == {"acc": 0.5, "n": 7.0}
    assert found.items == {"acc": {"a": 1.0, "b": 0.0}}
    assert (tmp_path / "out" / "stdout.txt").read_text() == "a model 7\n"


def test_a_program_that_fails_is_quoted(tmp_path):
    code = "import sys; print('0.9'); sys.exit('no such task')"
    with pytest.raises(EvaluationError, match="exit code 1: no such task"):
        run(python(code, "{model}"), tmp_path)


def test_a_program_that_is_not_there_is_named(tmp_path):
    with pytest.raises(EvaluationError, match="no-such-program cannot be started"):
        run("no-such-program {model}", tmp_path)


def test_a_program_that_hangs_is_ended_with_all_that_it_started(tmp_path):
    code = (
        "import os, sys, time; child = os.fork(); "
        "child and open(sys.argv[1], 'w').write(str(child)); time.sleep(60)"
    )
    text = python(code, str(tmp_path / "child"), "{model}")
    started = time.monotonic()
    with pytest.raises(EvaluationError, match="more than 1 s"):
        run(text, tmp_path, timeout=1)
    assert time.monotonic() - started < 20
    child = int((tmp_path / "child").read_text())
    for _ in range(100):
        if not os.path.exists(f"/proc/{child}") or "Z" in Path(f"/proc/{child}/stat").read_text():
            return
        time.sleep(0.05)
    pytest.fail("the child still runs")


@pytest.mark.parametrize(
    ("text", "metrics", "items", "named"),
    [
        ("prog", (), (), "{model}"),
        ("prog '{model}", (), (), "quotation"),
        ("p {model}", ("a=f:x", "a=f:y"), (), "two metrics"),
        ("p {model}", ("a=f:x", "b=f:y"), ("f:z",), "of which metric"),
        ("p {model}", ("a=f:x",), ("b=f:z",), "of which metric"),
    ],
)
def test_commands_that_cannot_work_are_refused(text, metrics, items, named):
    with pytest.raises(RecipeError) as caught:
        command_of(text, metrics, items)
    assert named in str(caught.value)
