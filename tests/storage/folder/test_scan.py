"""Links, git-lfs pointers and unreadable files in the folder of a checkpoint."""

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from drift_merge.errors import CheckpointError
from drift_merge.storage.adapters.fields import read_fields
from drift_merge.storage.checkpoint import open_checkpoint
from drift_merge.storage.folder import limits
from drift_merge.storage.folder.contents import sort_files
from drift_merge.storage.folder.limits import Recent, share_of_files
from drift_merge.storage.folder.scan import require_carried, scan
from drift_merge.storage.sources import parse_source
from tests import checkpoints as c

ONE = {"a": c.Stored("BF16", (2,), bytes(4))}
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 4976698672\n"


def checked(path: Path) -> list[str]:
    """The files that a merge would carry."""
    checkpoint = open_checkpoint(str(path))
    require_carried(path, checkpoint.folder, "GIVEN")
    return list(checkpoint.sidecars)


def test_links_within_the_folder_are_followed_and_loops_end(tmp_path: Path) -> None:
    path = c.write_checkpoint(tmp_path / "m", ONE, {}, sidecars={"real/a.txt": b"x"})
    (path / "b.txt").symlink_to("real/a.txt")
    (path / "folder").symlink_to("real")
    (path / "real/up").symlink_to(path)
    (path / "self").symlink_to("self")
    assert checked(path) == ["b.txt", "config.json", "folder/a.txt", "real/a.txt"]
    assert set(open_checkpoint(str(path)).folder.left_out) == {"self"}


def test_the_layout_of_the_hub_s_cache_and_a_folder_of_links_into_one_other_are_folders(
    tmp_path: Path,
) -> None:
    path = c.write_checkpoint(tmp_path / "real", ONE, {}, sidecars={"LICENSE": b"x"})
    links = tmp_path / "snapshots/1a2b"
    links.mkdir(parents=True)
    for file in path.iterdir():
        (links / file.name).symlink_to(os.path.relpath(file, links))
    assert checked(links) == ["LICENSE", "config.json"]


@pytest.mark.parametrize("is_folder", [False, True])
def test_a_link_out_of_the_folder_is_refused_before_it_is_published_and_the_remedy_works(
    is_folder: bool, tmp_path: Path
) -> None:
    secret = tmp_path / "secret"
    if is_folder:
        secret.mkdir()
    target = secret / "key" if is_folder else secret
    target.write_text("private")
    path = c.write_checkpoint(tmp_path / "my m", ONE, {})
    (path / "note s").symlink_to(secret)
    with pytest.raises(CheckpointError, match=f"note s is a link to {secret}, outside") as caught:
        checked(path)
    subprocess.run(caught.value.remedy.partition("in its place: ")[2], shell=True, check=True)
    assert not (path / "note s").is_symlink()
    assert checked(path) == ["config.json", "note s/key" if is_folder else "note s"]


def test_weights_on_another_disk_are_followed(tmp_path: Path) -> None:
    path = c.write_checkpoint(tmp_path / "m", ONE, {})
    (tmp_path / "big").mkdir()
    moved = (path / "model.safetensors").rename(tmp_path / "big/x.safetensors")
    (path / "model.safetensors").symlink_to(moved)
    assert checked(path) == ["config.json"]


@pytest.mark.parametrize(
    "name",
    ["model.safetensors", "config.json", "tokenizer.json", "model.safetensors.index.json"],
)
def test_a_git_lfs_pointer_is_called_so_with_the_command_that_fetches_it(
    name: str, tmp_path: Path
) -> None:
    path = c.write_checkpoint(tmp_path / "my m", ONE, {})
    if name.endswith("index.json"):
        (path / "model.safetensors").rename(path / "model-00001-of-00001.safetensors")
    (path / name).write_bytes(POINTER)
    with pytest.raises(CheckpointError, match=f"{name} is a git-lfs pointer") as caught:
        checked(path)
    assert caught.value.remedy.endswith(f"cd '{path}' && git lfs pull")


def test_the_config_of_an_adapter_may_be_a_pointer_too(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_bytes(POINTER)
    with pytest.raises(CheckpointError, match=r"adapter_config\.json is a git-lfs"):
        read_fields(parse_source(str(tmp_path)))


def test_a_file_that_only_begins_like_a_pointer_is_none(tmp_path: Path) -> None:
    text = b"version https://example.org\n"
    path = c.write_checkpoint(tmp_path / "m", ONE, {}, sidecars={"VERSION": text})
    assert checked(path) == ["VERSION", "config.json"]


def test_pipes_are_no_files(tmp_path: Path) -> None:
    path = c.write_checkpoint(tmp_path / "m", ONE, {})
    os.mkfifo(path / "pipe")
    assert "pipe" not in scan(path).files
    assert checked(path) == ["config.json"]


def test_an_account_of_a_scan_loses_no_file(tmp_path: Path) -> None:
    path = c.make_pair(tmp_path, layers=1, num_shards=2, mllm_sidecars=c.SIDECARS).mllm
    (path / "optimizer.pt").write_bytes(b"123")
    files, astray = scan(path)
    assert files == {name: len(data) for name, data in c.read_files(path).items()}
    folder = sort_files(files, open_checkpoint(str(path)).shards, astray)
    assert sum(folder.carried.values()) == folder.size_bytes
    assert folder.left_out["optimizer.pt"].size_bytes == 3


def test_what_was_opened_last_stays_and_the_rest_is_let_go() -> None:
    left: list[int] = []
    recent: Recent[int] = Recent(2, left.append)
    for name, value in (("a", 1), ("b", 2), ("a", 9), ("c", 3)):
        recent.get(name, lambda value=value: value)  # type: ignore[misc]
    assert (recent.names(), left) == (["a", "c"], [2])
    assert (recent.find("a"), recent.find("b"), recent.drop("a")) == (1, None, 1)
    assert recent.names() == ["c"]


@pytest.mark.parametrize(("limit", "expected"), [(64, 4), (256, 52), (1, 2), (2**20, 262132)])
def test_inputs_and_outputs_share_the_files_that_a_process_may_open(
    limit: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("resource.getrlimit", lambda _: (limit, limit))
    assert share_of_files(2) == expected


def test_a_link_that_may_not_be_followed_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "link").symlink_to("elsewhere")
    real = os.path.realpath

    def realpath(path: Any, **how: Any) -> str:
        if Path(path).name == "link":
            raise PermissionError(13, "Permission denied")
        return str(real(path, **how))

    monkeypatch.setattr(os.path, "realpath", realpath)
    with pytest.raises(CheckpointError, match="link cannot be read: Permission denied"):
        scan(tmp_path)


def test_a_file_that_is_held_to_the_end_of_the_interpreter_is_closed(tmp_path, monkeypatch):
    """Its module has been emptied then."""
    (tmp_path / "a").write_bytes(b"x")
    held = limits.Descriptor(tmp_path / "a", os.O_RDONLY)
    number = held.number
    with monkeypatch.context() as patch:
        patch.setattr(limits, "os", None)
        del held
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(number)
