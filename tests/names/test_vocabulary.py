"""Rows of two vocabularies, paired by token."""

from drift_merge.names.vocabulary import compare_vocabularies, match_rows

AB = {"a": 0, "b": 1}


def rows(*args, **kwargs):
    return list(match_rows(*args, **kwargs).rows)


def test_equal_vocabularies_and_rows_are_the_identity():
    found = match_rows(AB, dict(AB), reasoner_rows=2, mllm_rows=2)
    assert (list(found.rows), found.is_identity, found.num_unmatched) == ([0, 1], True, 0)


def test_padding_is_never_paired_by_number_however_equal_the_tokenizers_are():
    found = match_rows(AB, AB, reasoner_rows=4, mllm_rows=4)
    assert (list(found.rows), found.is_identity) == ([0, 1, -1, -1], False)
    assert (found.num_matched, found.num_unmatched, found.num_unexplained) == (2, 2, 2)
    assert rows({"a": 0, "c": 1}, AB, reasoner_rows=4, mllm_rows=4) == [0, -1, -1, -1]
    assert rows(AB, AB, reasoner_rows=3, mllm_rows=5) == [0, 1, -1, -1, -1]


def test_a_row_that_only_the_reasoner_lacks_is_explained():
    found = match_rows({"a": 0}, {"a": 1, "<image>": 0}, reasoner_rows=1, mllm_rows=3)
    assert (list(found.rows), found.num_unmatched, found.num_unexplained) == ([-1, 0, -1], 2, 1)


def test_two_tokens_of_one_id_that_are_apart_in_the_reasoner_are_no_partner():
    assert rows({"a": 0, "b": 1}, {"a": 0, "b": 0}, reasoner_rows=2, mllm_rows=1) == [-1]
    assert rows({"a": 1, "b": 1}, {"a": 0, "b": 0}, reasoner_rows=2, mllm_rows=1) == [1]


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
