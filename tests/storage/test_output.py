"""The life of an output directory, without an engine: what a crash leaves and what follows."""

import os
from contextlib import suppress
from pathlib import Path

import pytest

from drift_merge.errors import CheckpointError, OutputError, VerificationError
from drift_merge.storage.output import OutputDirectory
from drift_merge.storage.outputs.existing import check_output, partial_of
from tests.checkpoints import read_files

PLAN, OTHER = "xxh3:1", "xxh3:2"


def opened(out: Path, plan: str = PLAN, *, overwrite: bool = False) -> OutputDirectory:
    return OutputDirectory(out, plan=plan, overwrite=overwrite)


def make(out: Path, text: bytes = b"new", *, overwrite: bool = False, plan: str = PLAN) -> None:
    with opened(out, plan, overwrite=overwrite) as output:
        output.write_file("a/file.json", text)
        output.publish()


def interrupt(out: Path, plan: str = PLAN) -> None:
    """A run that stops with one tensor finished."""
    with suppress(KeyboardInterrupt), opened(out, plan) as output:
        (output.payload / "model.safetensors").write_bytes(b"data")
        fail(output, KeyboardInterrupt(), finished=True)


def fail(output: OutputDirectory, error: BaseException, *, finished: bool) -> None:
    output.write_file("config.json", b"{}")
    if finished:
        output.record({"a": {"fingerprint": "x"}})
    raise error


def test_nothing_but_the_output_is_left_after_publishing(tmp_path: Path) -> None:
    make(tmp_path / "out")
    assert read_files(tmp_path) == {"out/a/file.json": b"new"}


def test_the_output_does_not_exist_before_it_is_published(tmp_path: Path) -> None:
    with opened(tmp_path / "out") as output:
        output.write_file("file", b"x")
        assert not (tmp_path / "out").exists()
        output.publish()
        assert (tmp_path / "out").is_dir()


def test_a_run_that_ends_without_publishing_publishes_nothing(tmp_path: Path) -> None:
    with opened(tmp_path / "out") as output:
        output.write_file("file", b"x")
    assert not (tmp_path / "out").exists()


def test_a_run_that_failed_before_anything_was_done_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyError), opened(tmp_path / "out") as output:
        fail(output, KeyError(), finished=False)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("error", [CheckpointError, VerificationError])
def test_a_run_that_could_only_fail_again_leaves_nothing(
    error: type[CheckpointError], tmp_path: Path
) -> None:
    with pytest.raises(error), opened(tmp_path / "out") as output:
        fail(output, error("bad input"), finished=True)
    assert os.listdir(tmp_path) == []


def test_the_same_plan_takes_over_what_was_finished_and_another_is_refused(tmp_path: Path) -> None:
    interrupt(tmp_path / "out")
    before = read_files(tmp_path)
    with (
        pytest.raises(OutputError, match="other inputs or options") as caught,
        opened(tmp_path / "out", OTHER),
    ):
        pass
    assert f"rm -r {tmp_path / 'out.partial'}" in caught.value.remedy
    assert read_files(tmp_path) == before
    with opened(tmp_path / "out") as output:
        assert output.finished == {"a": {"fingerprint": "x"}}
        assert read_files(output.payload) == {"model.safetensors": b"data"}


def test_small_files_of_an_earlier_run_are_not_taken_over(tmp_path: Path) -> None:
    interrupt(tmp_path / "out")
    payload = tmp_path / "out.partial" / "payload"
    (payload / "remote").mkdir()
    (payload / "remote" / "old.py").write_text("old")
    (payload / "link").symlink_to(tmp_path)
    with opened(tmp_path / "out") as output:
        output.publish()
    assert read_files(tmp_path) == {"out/model.safetensors": b"data"}


def test_a_plan_that_was_published_before_the_kill_is_recognized(tmp_path: Path) -> None:
    interrupt(tmp_path / "out")
    (tmp_path / "out.partial" / "payload").rename(tmp_path / "out")
    check_output(tmp_path / "out", [], overwrite=False)
    with pytest.raises(OutputError, match="exists already"), opened(tmp_path / "out", OTHER):
        pass
    with opened(tmp_path / "out") as output:
        assert output.is_published
        output.tidy()
    assert sorted(os.listdir(tmp_path)) == ["out"]


def test_overwriting_replaces_all_files(tmp_path: Path) -> None:
    make(tmp_path / "out", b"old")
    (tmp_path / "out" / "extra").write_bytes(b"old")
    with pytest.raises(OutputError, match="exists already"):
        make(tmp_path / "out", plan=OTHER)
    assert read_files(tmp_path) == {"out/a/file.json": b"old", "out/extra": b"old"}
    make(tmp_path / "out", plan=OTHER, overwrite="any")
    assert read_files(tmp_path) == {"out/a/file.json": b"new"}


def test_a_refusal_leaves_no_partial_directory(tmp_path: Path) -> None:
    make(tmp_path / "out")
    with pytest.raises(OutputError, match="exists already"), opened(tmp_path / "out", OTHER):
        pass
    assert os.listdir(tmp_path) == ["out"]


def test_an_old_output_that_a_kill_left_aside_is_put_back_first(tmp_path: Path) -> None:
    make(tmp_path / "out", b"old")
    (tmp_path / "out").rename(tmp_path / "aside")
    interrupt(tmp_path / "out")
    (tmp_path / "aside").rename(tmp_path / "out.partial" / "replaced")
    with pytest.raises(OutputError, match="exists already"), opened(tmp_path / "out"):
        pass
    assert read_files(tmp_path / "out") == {"a/file.json": b"old"}
    make(tmp_path / "out", overwrite="any")
    assert read_files(tmp_path / "out")["a/file.json"] == b"new"
    assert os.listdir(tmp_path) == ["out"]


def test_the_lock_is_held_until_the_end(tmp_path: Path) -> None:
    with opened(tmp_path / "out") as output:
        with pytest.raises(OutputError, match="another process is writing"), opened(output.out):
            pass
        output.write_file("file", b"x")
        output.publish()
    make(tmp_path / "other")


def test_no_file_stays_open(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    make(tmp_path / "out")
    interrupt(tmp_path / "next")
    with pytest.raises(OutputError), opened(tmp_path / "out", OTHER):
        pass
    with opened(tmp_path / "next"), pytest.raises(OutputError), opened(tmp_path / "next"):
        pass
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_link_to_a_directory_stands_for_that_directory(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to("disk/out")
    assert partial_of(tmp_path / "link") == tmp_path / "disk" / "out.partial"
    (tmp_path / "disk" / "out").mkdir()
    make(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert read_files(tmp_path / "disk") == {"out/a/file.json": b"new"}


def test_folders_and_files_are_flushed_before_the_rename(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    fsync, rename = os.fsync, os.rename

    def record_fsync(descriptor: int) -> None:
        order.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    def record_rename(old: Path, new: Path) -> None:
        order.append(f"rename to {new}")
        rename(old, new)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(os, "rename", record_rename)
    make(tmp_path / "out")
    payload = tmp_path / "out.partial" / "payload"
    at = order.index(f"rename to {tmp_path / 'out'}")
    for path in (payload, payload / "a", payload / "a" / "file.json"):
        assert order.index(str(path)) < at
    assert order[at + 1 :] == [str(tmp_path)]
