"""Rows of two vocabularies, paired by token."""

import sys

import pytest

from drift_merge.errors import AlignmentError, CheckpointError, SourceError
from drift_merge.names.vocabulary import Vocabularies, compare_vocabularies, match_rows

AB = {"a": 0, "b": 1}


def rows(*args, **kwargs):
    return list(match_rows(*args, **kwargs).rows)


def test_equal_vocabularies_and_rows_are_the_identity():
    found = match_rows(AB, dict(AB), reasoner_rows=4, mllm_rows=4)
    assert (list(found.rows), found.is_identity, found.num_unmatched) == ([0, 1, 2, 3], True, 0)


def test_padding_beyond_the_shorter_tensor_has_no_partner():
    assert rows(AB, AB, reasoner_rows=3, mllm_rows=5) == [0, 1, 2, -1, -1]
    assert not match_rows(AB, AB, reasoner_rows=5, mllm_rows=3).is_identity


def test_padding_is_never_paired_by_number_when_tokenizers_differ():
    assert rows({"a": 0, "c": 1}, AB, reasoner_rows=4, mllm_rows=4) == [0, -1, -1, -1]


def test_moved_tokens_are_followed():
    assert rows({"b": 0, "a": 1}, AB, reasoner_rows=2, mllm_rows=2) == [1, 0]


def test_ids_that_are_no_row_are_ignored():
    found = match_rows({"a": 9, "b": 1}, {"a": 0, "b": 7}, reasoner_rows=2, mllm_rows=2)
    assert (list(found.rows), found.num_matched) == ([-1, -1], 0)


def test_an_empty_tensor_has_no_rows():
    assert rows(AB, AB, reasoner_rows=2, mllm_rows=0) == []


def test_tokens_that_share_an_id_are_named_up_to_three():
    ours = {"x": 0, "<think>": 151648, "</think>": 151649}
    theirs = {"x": 0, "<|box_start|>": 151648, "<|box_end|>": 151649}
    (finding,) = compare_vocabularies(ours, theirs)
    assert finding.code == "tokens_differ"
    assert "id 151648 is <think> and <|box_start|>" in finding.message
    assert finding.message.startswith("2 ids stand for different tokens")
    many = {f"a{i}": i for i in range(9)}, {f"b{i}": i for i in range(9)}
    assert compare_vocabularies(*many)[0].message.endswith("id 2 is a2 and b2 and 6 more.")


def test_ids_that_only_one_vocabulary_has_are_no_difference():
    assert compare_vocabularies(AB, {**AB, "c": 2}) == ()


def write_tokenizer(path):
    from tokenizers import AddedToken, Tokenizer
    from tokenizers.models import WordLevel

    tokenizer = Tokenizer(WordLevel({"a": 0, "b": 1}, unk_token="a"))
    tokenizer.add_special_tokens([AddedToken("<think>", special=True)])
    tokenizer.save(str(path))


def test_a_tokenizer_json_gives_its_added_tokens_too(tmp_path):
    write_tokenizer(tmp_path / "tokenizer.json")
    assert Vocabularies().read(tmp_path / "tokenizer.json") == {"a": 0, "b": 1, "<think>": 2}


def test_files_of_equal_text_are_one_vocabulary_and_others_are_not(tmp_path):
    (tmp_path / "other").mkdir()
    first, second = tmp_path / "tokenizer.json", tmp_path / "other" / "tokenizer.json"
    write_tokenizer(first)
    second.write_bytes(first.read_bytes())
    known = Vocabularies()
    assert known.read(first) is known.read(second)
    second.write_text(second.read_text().replace("<think>", "<other>"))
    assert known.read(second) == {"a": 0, "b": 1, "<other>": 2}
    assert known.read(first) == {"a": 0, "b": 1, "<think>": 2}


def test_a_missing_library_is_named_with_the_extra(tmp_path, monkeypatch):
    write_tokenizer(tmp_path / "tokenizer.json")
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(AlignmentError) as caught:
        Vocabularies().read(tmp_path / "tokenizer.json")
    assert caught.value.remedy == "pip install 'drift_merge[tokenizers]'"


@pytest.mark.parametrize("text", ["", "{", "[]", '{"model": 3}', "\x00"])
def test_a_broken_tokenizer_is_refused_by_name(tmp_path, text):
    path = tmp_path / "tokenizer.json"
    path.write_text(text)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is not a tokenizer"):
        Vocabularies().read(path)


def test_a_missing_file_is_a_missing_source(tmp_path):
    with pytest.raises(SourceError, match="there is no"):
        Vocabularies().read(tmp_path / "tokenizer.json")
