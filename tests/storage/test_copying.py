"""Files beside the weights: copied in windows, flushed, and told apart from what failed."""

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from drift_merge.errors import CheckpointError, OutputError
from drift_merge.storage import fingerprints
from drift_merge.storage.copying import copy_file, write_file

WINDOW = fingerprints.WINDOW_BYTES


@pytest.mark.parametrize("size", [0, 1, WINDOW - 1, WINDOW, WINDOW + 1, 2 * WINDOW + 7])
def test_a_copy_has_the_bytes_and_their_fingerprint(size: int, tmp_path: Path) -> None:
    data = (b"0123456789abcdef" * (size // 16 + 1))[:size]
    (tmp_path / "a").write_bytes(data)
    found = copy_file(tmp_path / "a", tmp_path / "deep/er/b", "A")
    assert (tmp_path / "deep/er/b").read_bytes() == data
    assert found == fingerprints.of_bytes(data) == fingerprints.of_file(tmp_path / "a")


def test_a_longer_file_that_was_there_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"new")
    (tmp_path / "b").write_bytes(b"old and longer")
    copy_file(tmp_path / "a", tmp_path / "b", "A")
    assert (tmp_path / "b").read_bytes() == b"new"


def test_a_source_that_is_missing_is_the_inputs_fault(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="A cannot be read: No such file"):
        copy_file(tmp_path / "a", tmp_path / "b", "A")


@pytest.mark.parametrize("call", ["posix_fallocate", "write", "fsync"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EROFS, errno.EMFILE])
def test_a_fault_of_the_target_is_the_outputs_with_its_remedy(
    call: str, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    (tmp_path / "a").write_bytes(b"data")
    monkeypatch.setattr(os, call, fail)
    with pytest.raises(OutputError, match=os.strerror(number)) as caught:
        copy_file(tmp_path / "a", tmp_path / "b", "A")
    word = {errno.ENOSPC: "Free some space", errno.EMFILE: "ulimit"}.get(number, "")
    assert word in caught.value.remedy


@pytest.mark.parametrize("change", [-1, +1])
def test_a_source_that_changes_meanwhile_is_refused(
    change: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a"
    path.write_bytes(bytes(2 * WINDOW))
    real = os.write

    def write(descriptor: int, data: memoryview) -> int:
        os.truncate(path, 2 * WINDOW + change)
        return real(descriptor, data)

    monkeypatch.setattr(os, "write", write)
    with pytest.raises(CheckpointError, match="A changed while it was being used"):
        copy_file(path, tmp_path / "b", "A")


def test_writes_of_one_byte_at_a_time_make_the_same_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.write
    (tmp_path / "a").write_bytes(b"some bytes")
    monkeypatch.setattr(os, "write", lambda descriptor, data: real(descriptor, data[:1]))
    copy_file(tmp_path / "a", tmp_path / "b", "A")
    assert (tmp_path / "b").read_bytes() == b"some bytes"


def test_a_small_file_is_written_with_its_folders(tmp_path: Path) -> None:
    write_file(tmp_path / "x/y", b"z")
    assert (tmp_path / "x/y").read_bytes() == b"z"
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OutputError, match="cannot be written"):
        write_file(tmp_path / "file/y", b"z")
