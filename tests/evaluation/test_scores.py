"""Where programs leave their scores, and what is no score."""

import json
import os
import time

import pytest

from drift_merge.errors import EvaluationError, RecipeError
from drift_merge.evaluation.scores import parse_place, read_items, read_value


def value(text, folder, stdout="", since=0.0):
    return read_value(parse_place(text, "--metric"), folder, stdout, since)


def items(text, folder, stdout=""):
    return read_items(parse_place(text, "--items"), folder, stdout, 0.0)


def test_a_path_leads_through_objects_lists_and_quoted_names(tmp_path):
    content = {"results": {"maths.mini": [{"acc,none": 0.25}, {"acc,none": True}]}}
    (tmp_path / "1_results.json").write_text(json.dumps(content))
    assert value('*_results.json:results."maths.mini".0."acc,none"', tmp_path) == 0.25
    assert value('*_results.json:results."maths.mini".-1."acc,none"', tmp_path) == 1.0


@pytest.mark.parametrize(
    ("printed", "expected"),
    [("loss 3\naccuracy: 61.5 %\n", 61.5), ("-1e-3", -0.001), ("a1b\n.5", 0.5), ("7.", 7.0)],
)
def test_the_last_number_of_stdout_counts(tmp_path, printed, expected):
    assert value("stdout", tmp_path, printed) == expected


def test_the_last_line_of_stdout_may_be_an_object(tmp_path):
    assert value("a=stdout:x.y", tmp_path, '{"x": 1}\n{"x": {"y": 2}}\n\n') == 2.0


@pytest.mark.parametrize(
    ("text", "stdout", "named"),
    [
        ("stdout", "no digits", "no number"),
        ("stdout:x", "3", "x"),
        ("stdout:x", "plain", "not JSON"),
        ("none.json:x", "", "none.json"),
        ("f.json:text", "", "finite number"),
        ("f.json:nan", "", "finite number"),
        ("f.json:missing", "", "it has text, nan, list"),
        ("f.json:list.3", "", "1 entries"),
        ("broken.json:x", "", "broken.json"),
    ],
)
def test_what_is_no_score_is_named(tmp_path, text, stdout, named):
    (tmp_path / "f.json").write_text('{"text": "high", "nan": NaN, "list": [1]}')
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(EvaluationError, match=named):
        value(text, tmp_path, stdout)


def test_a_file_from_before_the_evaluation_is_never_read(tmp_path):
    file = tmp_path / "old.json"
    file.write_text('{"x": 1}')
    os.utime(file, (time.time() - 60,) * 2)
    assert value("old.json:x", tmp_path) == 1.0
    with pytest.raises(EvaluationError, match="wrote no file"):
        value("old.json:x", tmp_path, since=time.time() - 10)


def test_of_several_files_that_fit_the_newest_is_read(tmp_path):
    for age, number in ((30, 1), (10, 2), (20, 3)):
        file = tmp_path / f"{number}.json"
        file.write_text(json.dumps({"x": number}))
        os.utime(file, (time.time() - age,) * 2)
    assert value("*.json:x", tmp_path) == 2.0


def test_items_come_from_lines_lists_and_objects(tmp_path):
    lines = [{"doc_id": 7, "right": True}, {"doc_id": 9, "right": False}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    (tmp_path / "b.json").write_text(json.dumps({"q": {"x": 1, "y": 0.5}, "l": [1, 0], "o": lines}))
    assert items("a.jsonl:right", tmp_path) == {"7": 1.0, "9": 0.0}
    assert items("b.json:q", tmp_path) == {"x": 1.0, "y": 0.5}
    assert items("b.json:l", tmp_path) == {"0": 1.0, "1": 0.0}
    assert items("b.json:o.*.right", tmp_path) == {"7": 1.0, "9": 0.0}
    assert items("m=stdout:s", tmp_path, '{"s": {"a": 1}}') == {"a": 1.0}


@pytest.mark.parametrize(
    "content",
    ['{"x": 3}', '{"x": []}', '{"x": [{"id": 1, "s": 1}, {"id": 1, "s": 0}]}', '{"x": "a"}'],
)
def test_items_that_are_none_or_twice_are_refused(tmp_path, content):
    (tmp_path / "f.json").write_text(content)
    with pytest.raises(EvaluationError):
        items("f.json:x.*.s" if "id" in content else "f.json:x", tmp_path)


@pytest.mark.parametrize("text", ["", "scores.json", "scores.json:", ":x", "a=", "a=:x"])
def test_a_place_without_a_file_or_a_path_is_refused(text):
    with pytest.raises(RecipeError, match="--metric"):
        parse_place(text, "--metric")


def test_a_metric_is_named_by_the_user_or_by_its_path():
    assert parse_place("maths=a.json:x.y", "--metric").name == "maths"
    assert parse_place('a.json:x."acc,none"', "--metric").name == "acc,none"
