import errno
import json
import os
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from drift_merge.errors import OutputError
from drift_merge.storage.journal import Journal, read_journal
from drift_merge.storage.measured import Results
from tests.strategies import quick, texts

PLAN = "xxh3:0123"
results = st.dictionaries(
    texts(max_size=5),
    st.dictionaries(texts(max_size=3), st.integers() | texts(max_size=3) | st.none()),
    min_size=1,
    max_size=3,
)


def write(path: Path, flushers: list[Results]) -> list[int]:
    """Write a journal; the size of the file after each line."""
    journal = Journal(path, plan=PLAN, good_bytes=0)
    sizes = [path.stat().st_size]
    for extent in flushers:
        journal.append(extent)
        sizes.append(path.stat().st_size)
    journal.close()
    return sizes


def joined(flushers: list[Results]) -> Results:
    found: Results = {}
    for extent in flushers:
        found |= extent
    return found


@quick
@given(st.lists(results, max_size=4), st.data())
@example([{"\u2028\r": {"\x85": "\n"}}], None)
def test_a_journal_cut_anywhere_yields_its_whole_lines_and_can_be_continued(
    flushers: list[Results], data: st.DataObject | None
) -> None:
    with TemporaryDirectory() as folder:
        path = Path(folder, "journal.jsonl")
        sizes = write(path, flushers)
        assert read_journal(path) == (PLAN, joined(flushers), sizes[-1])
        cut = data.draw(st.integers(0, sizes[-1])) if data else sizes[-1] - 1
        os.truncate(path, cut)
        lines = sum(size <= cut for size in sizes)
        plan, finished, good = read_journal(path)
        assert plan == (PLAN if lines else None)
        assert finished == joined(flushers[: max(lines - 1, 0)])
        assert good == (sizes[lines - 1] if lines else 0)
        journal = Journal(path, plan=PLAN, good_bytes=good)
        journal.append({"new": {"fingerprint": "x"}})
        journal.close()
        plan, again, good = read_journal(path)
        assert (plan, again) == (PLAN, finished | {"new": {"fingerprint": "x"}})
        assert good == path.stat().st_size


def test_there_is_no_plan_where_there_is_no_journal(tmp_path: Path) -> None:
    assert read_journal(tmp_path / "journal.jsonl") == (None, {}, 0)


@pytest.mark.parametrize(
    "line", [b"[]", b"3", b"null", b"{}", b'{"done": 3}', b'{"done": [1]}', b"\xff", b"[" * 10**5]
)
def test_a_line_that_is_not_ours_ends_the_journal(line: bytes, tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    size = write(path, [{"a": {}}])[-1]
    with open(path, "ab") as file:
        file.write(line + b'\n{"done": {"b": {}}}\n')
    assert read_journal(path) == (PLAN, {"a": {}}, size)
    path.write_bytes(line + b"\n")
    assert read_journal(path) == (None, {}, 0)


@pytest.mark.parametrize("plan", [b"3", b"null", b"{}", b"[1]"])
def test_a_plan_that_is_no_text_is_no_plan(plan: bytes, tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    path.write_bytes(b'{"plan": ' + plan + b"}\n")
    assert read_journal(path) == (None, {}, 0)


def test_every_line_is_flushed_before_append_returns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed: list[int] = []
    fsync = os.fsync

    def record(descriptor: int) -> None:
        fsync(descriptor)
        flushed.append(os.fstat(descriptor).st_size)

    monkeypatch.setattr(os, "fsync", record)
    sizes = write(tmp_path / "journal.jsonl", [{"a": {}}, {}, {"b": {}}])
    assert flushed == [sizes[0], sizes[1], sizes[3]]
    assert sizes[1] == sizes[2], "an empty extent needs no line"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize("call", ["write", "fsync", "ftruncate", "open"])
def test_a_journal_that_cannot_be_written_is_an_output_error_and_leaves_no_file_open(
    call: str, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    before = len(os.listdir("/proc/self/fd"))
    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        with pytest.raises(OutputError, match=r"journal\.jsonl cannot be written") as caught:
            Journal(tmp_path / "journal.jsonl", plan=PLAN, good_bytes=0)
    assert "run the same command again" in caught.value.remedy
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_write_of_nothing_is_an_error_not_an_endless_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "write", lambda *_: 0)
    with pytest.raises(OutputError, match="nothing was written"):
        Journal(tmp_path / "journal.jsonl", plan=PLAN, good_bytes=0)


def test_writes_of_one_byte_make_whole_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_some = os.write
    monkeypatch.setattr(os, "write", lambda file, data: write_some(file, data[:1]))
    write(tmp_path / "journal.jsonl", [{"a": {"b": 1}}])
    lines = (tmp_path / "journal.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"plan": PLAN}, {"done": {"a": {"b": 1}}}]


def test_a_journal_that_cannot_be_read_is_an_output_error(tmp_path: Path) -> None:
    (tmp_path / "journal.jsonl").mkdir()
    with pytest.raises(OutputError, match="cannot be read") as caught:
        read_journal(tmp_path / "journal.jsonl")
    assert str(tmp_path) in caught.value.remedy
