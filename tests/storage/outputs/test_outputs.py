"""What a file system promises, the lock where it does not reach, and what --overwrite replaces."""

import fcntl
import json
from pathlib import Path

import pytest

from drift_merge.errors import OutputError
from drift_merge.storage.outputs import lock
from drift_merge.storage.outputs.existing import check_output
from drift_merge.storage.outputs.filesystems import FileSystem, file_system_in

MOUNTS = """\
22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw
40 22 0:35 / /nfs rw,relatime shared:2 - nfs4 host:/x rw,vers=4.2,local_lock=none
41 22 0:36 / /old rw - nfs host:/y rw,vers=3,nolock,local_lock=all
42 22 0:37 / /lus\\040tre rw - lustre host:/z rw,flock,lazystatfs
43 22 0:38 / /lnoflock rw - lustre host:/z rw,lazystatfs
44 22 0:39 / /bee rw - beegfs beegfs rw
45 22 0:40 / /s3 rw - fuse.s3fs s3fs rw
46 40 0:41 / /nfs/local rw - xfs /dev/sdb rw
"""


@pytest.mark.parametrize(
    ("path", "kind", "reach", "coherent"),
    [
        ("/home/x", "ext4", True, True),
        ("/nfs/out", "nfs4", True, False),
        ("/nfsother", "ext4", True, True),
        ("/old", "nfs", False, False),
        ("/lus tre/a", "lustre", True, True),
        ("/lnoflock/a", "lustre", False, True),
        ("/bee/a", "beegfs", False, False),
        ("/s3/a", "fuse.s3fs", False, False),
        ("/nfs/local/a", "xfs", True, True),
    ],
)
def test_a_file_system_is_known_by_its_mount(
    path: str, kind: str, reach: bool, coherent: bool
) -> None:
    found = file_system_in(MOUNTS, path)
    assert (found.kind, found.locks_reach, found.is_coherent) == (kind, reach, coherent)


def test_where_locks_do_not_reach_another_host_is_refused_and_one_that_ended_well_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = FileSystem("beegfs", is_shared=True, locks_reach=False, is_coherent=False)
    monkeypatch.setattr(lock, "file_system_of", lambda _: place)
    monkeypatch.setattr(lock, "_SETTLE_SECONDS", 0.0)
    first = lock.DirectoryLock(tmp_path / "o.partial", tmp_path / "o")
    first.take()
    other = lock.DirectoryLock(tmp_path / "o.partial", tmp_path / "o")
    monkeypatch.setattr(lock.socket, "gethostname", lambda: "elsewhere")
    monkeypatch.setattr(lock.fcntl, "flock", lambda *_: None)  # as it does not reach
    with pytest.raises(OutputError, match="beegfs"):
        other.take()
    other.release()
    first.release()
    other.take()
    assert other.is_held
    other.release()


def test_a_file_system_without_locks_is_refused_and_not_called_another_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(*_: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    with pytest.raises(OutputError, match=r"cannot be locked .*: No locks available"):
        lock.DirectoryLock(tmp_path / "o.partial", tmp_path / "o").take()


def test_overwrite_replaces_what_is_ours_or_empty_and_any_what_is_there(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    check_output(out, [], overwrite=True)
    (out / "thesis.tex").write_text("all of it")
    (out / "list.json").write_text("[1")
    with pytest.raises(OutputError, match="none of them says") as refused:
        check_output(out, [], overwrite=True)
    assert "--overwrite=any" in refused.value.remedy
    check_output(out, [], overwrite="any")
    (out / "prior.json").write_text(json.dumps({"tool": {"name": "drift_merge"}}))
    check_output(out, [], overwrite=True)
