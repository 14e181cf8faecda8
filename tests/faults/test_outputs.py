"""Outputs that cannot or must not be written: full disks, clashes, rights, other processes."""

import fcntl
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.checkpoints import Pair, make_pair, read_files, store
from tests.faults.forks import NO_MOUNT, WRITES, Forks
from tests.faults.harness import assert_refusal, command, refused, run

NAMES = ("compute", "linear")


@pytest.fixture
def pair(tmp_path: Path) -> Pair:
    return make_pair(tmp_path / "pair", layers=1)


def tree(directory: Path) -> dict[str, bytes]:
    return read_files(directory)


# Full disks.


@pytest.mark.parametrize("name", NAMES)
def test_a_disk_that_is_too_small_is_found_before_any_work(
    name: str, pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.statvfs(tmp_path)
    nearly_full = os.statvfs_result([512, 512, *real[2:4], 3, *real[5:]])
    written: list[Any] = []
    monkeypatch.setattr(os, "statvfs", lambda _: nearly_full)
    monkeypatch.setattr(os, "pwrite", lambda *args: written.append(args))
    refused(command(name, pair, tmp_path / "out"), 6, str(tmp_path / "out"), "1,536 are free")
    assert not written


@pytest.mark.parametrize("name", NAMES)
def test_space_that_cannot_be_reserved_is_found_before_any_work(
    name: str, pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    written: list[Any] = []
    monkeypatch.setattr(os, "posix_fallocate", full)
    monkeypatch.setattr(os, "pwrite", lambda *args: written.append(args))
    refused(command(name, pair, tmp_path / "out"), 6, ".safetensors", "No space left", "Free some")
    assert not written


@pytest.mark.parametrize("number", [95, 22, 38], ids=["EOPNOTSUPP", "EINVAL", "ENOSYS"])
def test_a_disk_that_cannot_reserve_space_is_written_all_the_same(
    number: int, pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unsupported(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    assert run(*command("linear", pair, tmp_path / "out")).code == 0
    monkeypatch.setattr(os, "posix_fallocate", unsupported)
    assert run(*command("linear", pair, tmp_path / "again")).code == 0
    assert tree(tmp_path / "out") == tree(tmp_path / "again")


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """A pair whose output is some 400 kB, three quarters of them in one tensor of the tower."""
    name = "model.layers.0.mlp.extra_proj.weight"
    big = {name: store(np.ones((400, 400)))}
    notes = {"notes.txt": bytes(50_000)}
    return make_pair(
        tmp_path_factory.mktemp("large"), layers=1, reasoner=big, mllm=big, mllm_sidecars=notes
    )


@pytest.mark.parametrize("blind", [False, True], ids=["reserved", "found while writing"])
@pytest.mark.parametrize(
    ("name", "kilobytes"),
    [("compute", 64), ("compute", 328), ("linear", 64), ("linear", 300), ("linear", 348)],
)
def test_a_small_disk_that_fills_up_is_left_as_it_was_or_resumable(
    name: str, kilobytes: int, blind: bool, forks: Forks, large: Pair, tmp_path: Path
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    arguments = command(name, large, disk / "out")
    small = {"disk": str(disk), "disk_bytes": 1024 * kilobytes, "blind": blind}
    result = forks.run(*arguments, count=WRITES, **small)
    if result.code == NO_MOUNT:
        pytest.skip("this system does not let a process mount a file system of its own")
    assert_refusal(result, 6, [str(disk / "out"), "Free some space"])
    assert "out" not in result.left
    if kilobytes == 64 and not blind:
        assert result.left == []
        assert "pwrite" not in result.calls


# Places that must not be written.


def refused_untouched(pair: Pair, out: Path, *mentions: str, options: tuple[str, ...] = ()) -> None:
    """Both commands refuse with exit code 6, and no file of the inputs changes."""
    before = tree(pair.mllm.parent)
    for name in NAMES:
        arguments = [*command(name, pair, out), *options]
        for extra in ([], ["--dry-run"]):
            assert_refusal(run(*arguments, *extra), 6, mentions)
        assert run(*arguments, "--json").code == 6
    assert tree(pair.mllm.parent) == before
    assert not list(pair.mllm.parent.rglob("*.partial"))


@pytest.mark.parametrize("options", [(), ("--overwrite",)], ids=["", "overwrite"])
@pytest.mark.parametrize("role", ["reasoner", "mllm"])
@pytest.mark.parametrize(
    ("place", "verb"),
    [
        (lambda path: path, "is the input"),
        (lambda path: path / "." / "..", "holds the input"),
        (lambda path: path / "out", "is inside the input"),
        (lambda path: path / "a" / "b" / "out", "is inside the input"),
        (lambda path: path.parent, "holds the input"),
        (lambda path: path / ".." / path.name, "is the input"),
    ],
)
def test_an_output_that_touches_an_input_is_refused(
    place: Callable[[Path], Path], verb: str, role: str, options: tuple[str, ...], pair: Pair
) -> None:
    refused_untouched(
        pair, place(getattr(pair, role)), verb, "Choose a directory outside", options=options
    )


@pytest.mark.parametrize("role", ["reasoner", "mllm"])
def test_an_output_that_touches_an_input_through_a_link_is_refused(
    role: str, pair: Pair, tmp_path: Path
) -> None:
    link = tmp_path / "link"
    link.symlink_to(getattr(pair, role))
    parent = tmp_path / "up"
    parent.symlink_to(pair.mllm.parent)
    for out in (link, link / "out", parent / role, parent / role / "out", parent):
        refused_untouched(pair, out, "the input", options=("--overwrite",))
    linked = pair._replace(**{role: link})
    for out in (getattr(pair, role), getattr(pair, role) / "out"):
        refused_untouched(linked, out, "the input", options=("--overwrite",))


def test_an_input_given_as_a_file_is_guarded_like_its_directory(pair: Pair) -> None:
    single = pair._replace(mllm=pair.mllm / "model.safetensors")
    for name in NAMES:
        result = run(*command(name, single, pair.mllm / "out"))
        assert_refusal(result, 6, ["is inside the input"])


def test_an_input_named_like_the_partial_of_the_output_is_not_written(pair: Pair) -> None:
    mllm = pair.mllm.rename(pair.mllm.with_name("out.partial"))
    before = tree(mllm)
    for name in NAMES:
        arguments = command(name, pair._replace(mllm=mllm), mllm.with_name("out"))
        assert_refusal(run(*arguments), 6, ["out.partial", "which is not ours"])
    after = tree(mllm)
    after.pop("lock", None)
    assert after == before


@pytest.mark.parametrize("name", NAMES)
def test_an_output_that_exists_is_refused_and_kept(name: str, pair: Pair, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("precious")
    link = tmp_path / "link"
    link.symlink_to(out)
    for place in (out, link):
        assert_refusal(run(*command(name, pair, place)), 6, [str(place), "--overwrite"])
    assert tree(out) == {"mine.txt": b"precious"}
    assert sorted(os.listdir(tmp_path)) == ["link", "out", "pair"]


@pytest.mark.parametrize("options", [(), ("--overwrite",)], ids=["", "overwrite"])
@pytest.mark.parametrize("name", NAMES)
def test_a_file_in_the_place_of_the_output_is_refused_and_kept(
    name: str, options: tuple[str, ...], pair: Pair, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    out.write_text("precious")
    dangling = tmp_path / "dangling"
    dangling.symlink_to("nowhere")
    for place in (out, dangling):
        result = run(*command(name, pair, place), *options)
        assert_refusal(result, 6, [str(place), "is not a directory"])
    assert out.read_text() == "precious"
    assert dangling.is_symlink()


@pytest.mark.parametrize("name", NAMES)
def test_an_empty_directory_is_filled(name: str, pair: Pair, tmp_path: Path) -> None:
    for out in (tmp_path / "out", tmp_path / "target"):
        out.mkdir()
    (tmp_path / "link").symlink_to("target")
    assert run(*command(name, pair, tmp_path / "out")).code == 0
    assert run(*command(name, pair, tmp_path / "link")).code == 0
    assert (tmp_path / "link").is_symlink()
    assert tree(tmp_path / "target") == tree(tmp_path / "out") != {}


@pytest.mark.parametrize("name", NAMES)
def test_the_working_directory_is_refused_as_output(
    name: str, pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "up" / "here").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "up" / "here")
    for out in (Path(), Path(".."), tmp_path / "up"):
        result = run(*command(name, pair, out), "--overwrite")
        assert_refusal(result, 6, ["the working directory", "-o out"])
    assert sorted(os.listdir(tmp_path)) == ["pair", "up"]
    assert run(*command(name, pair, Path("out"))).code == 0


@pytest.mark.parametrize("name", NAMES)
def test_a_read_only_directory_is_refused(
    name: str, pair: Pair, forks: Forks, tmp_path: Path
) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o555)
    result = forks.run(*command(name, pair, closed / "out"), no_root=os.geteuid() == 0)
    assert_refusal(result, 6, [str(closed / "out"), "Permission denied", "with -o"])
    assert os.listdir(closed) == []


@pytest.mark.parametrize("name", NAMES)
def test_a_partial_that_belongs_to_someone_else_is_refused(
    name: str, pair: Pair, forks: Forks, tmp_path: Path
) -> None:
    (tmp_path / "out.partial").mkdir(mode=0o000)
    result = forks.run(*command(name, pair, tmp_path / "out"), no_root=os.geteuid() == 0)
    (tmp_path / "out.partial").chmod(0o700)
    assert_refusal(result, 6, [str(tmp_path / "out.partial"), "Permission denied"])


@pytest.mark.parametrize("name", NAMES)
def test_a_file_in_the_path_of_the_output_is_refused(name: str, pair: Pair, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("precious")
    refused(command(name, pair, tmp_path / "file" / "out"), 6, str(tmp_path / "file"))
    assert (tmp_path / "file").read_text() == "precious"


@pytest.mark.parametrize("name", NAMES)
def test_missing_parents_of_the_output_are_made(name: str, pair: Pair, tmp_path: Path) -> None:
    assert run(*command(name, pair, tmp_path / "a" / "b" / "out")).code == 0
    assert os.listdir(tmp_path / "a" / "b") == ["out"]


@pytest.mark.parametrize("name", NAMES)
def test_a_name_too_long_for_the_disk_is_refused(name: str, pair: Pair, tmp_path: Path) -> None:
    assert_refusal(run(*command(name, pair, tmp_path / ("x" * 252))), 6, ["File name too long"])


def test_overwrite_replaces_every_file_of_the_old_output(pair: Pair, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert (
        run(*command("linear", pair, out), "--weight", "0.5", "--max-shard-size", "2KB").code == 0
    )
    (out / "left over.txt").write_text("old")
    assert run(*command("linear", pair, out), "--overwrite").code == 0
    assert run(*command("linear", pair, tmp_path / "fresh")).code == 0
    assert tree(out) == tree(tmp_path / "fresh")
    assert sorted(os.listdir(tmp_path)) == ["fresh", "out", "pair"]


# Two processes.


@pytest.mark.parametrize("name", NAMES)
def test_a_second_process_is_refused_while_the_first_writes(
    name: str, pair: Pair, tmp_path: Path
) -> None:
    partial = tmp_path / "out.partial"
    (partial / "payload").mkdir(parents=True)
    (partial / "payload" / "model.safetensors").write_bytes(b"being written")
    with open(partial / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for options in ((), ("--overwrite",)):
            result = run(*command(name, pair, tmp_path / "out"), *options)
            assert_refusal(result, 6, ["another process is writing", str(tmp_path / "out")])
    assert tree(partial) == {"lock": b"", "payload/model.safetensors": b"being written"}


@pytest.mark.parametrize("options", [(), ("--overwrite",)], ids=["", "overwrite"])
@pytest.mark.parametrize("name", ["linear", pytest.param("compute", marks=pytest.mark.slow)])
def test_processes_that_race_for_one_output_leave_it_whole(
    name: str, options: tuple[str, ...], pair: Pair, forks: Forks, tmp_path: Path
) -> None:
    assert run(*command(name, pair, tmp_path / "whole")).code == 0
    whole = tree(tmp_path / "whole")
    for turn in range(6):
        out = tmp_path / f"out{turn}"
        arguments = [*command(name, pair, out), *options]
        runs = forks.run_all([{"arguments": arguments}] * 4)
        assert 0 in [result.code for result in runs]
        for result in runs:
            if result.code:
                assert_refusal(result, 6, [str(out)])
        assert tree(out) == whole
        assert not out.with_name(f"{out.name}.partial").exists()
        shutil.rmtree(out)
