"""What a file system promises to several hosts that use it at the same time.

By type and mount options, from /proc/self/mountinfo (Linux). Locks: flock(2) of the kernel's
clients: NFS passes it to the server unless `nolock` or `local_lock`; Lustre with `flock`; CephFS,
GPFS (Spectrum Scale), OCFS2, GFS2 and WekaFS always. Not known: BeeGFS, SMB, 9p, virtiofs, FUSE.
"""

import os
from dataclasses import dataclass
from pathlib import Path

_LOCKING = {"ceph", "gpfs", "ocfs2", "gfs2", "wekafs"}
_UNKNOWN = {"beegfs", "cifs", "smb3", "9p", "virtiofs", "afs", "orangefs", "pvfs2", "panfs"}
_UNKNOWN |= {"glusterfs", "dvs", "acfs", "davfs", "coda", "vboxsf", "vmhgfs", "prl_fs"}


@dataclass(frozen=True, slots=True)
class FileSystem:
    """Where a directory lies."""

    kind: str  # as mounted: ext4, nfs4, fuse.sshfs
    is_shared: bool  # several hosts may have it mounted
    locks_reach: bool  # a lock that one host takes is seen by the others
    is_coherent: bool  # two hosts may write next to each other in one file


def file_system_of(directory: Path) -> FileSystem:
    """The file system of an existing directory; one of this host where that is not known."""
    try:
        lines = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return FileSystem("unknown", is_shared=False, locks_reach=True, is_coherent=True)
    return file_system_in(lines, os.path.realpath(directory))


def file_system_in(mounts: str, path: str) -> FileSystem:
    """The file system of an absolute path, by the text of a mountinfo (proc(5))."""
    best, kind, options = "", "unknown", ""
    for line in mounts.splitlines():
        left, _, right = line.partition(" - ")
        fields, more = left.split(), right.split()
        if len(fields) < 6 or not more:
            continue
        point = fields[4].replace("\\040", " ")
        inside = path == point or path.startswith(point.rstrip("/") + "/")
        if inside and len(point) >= len(best):  # the last one covers those before it
            best, kind = point, more[0]
            options = ",".join([fields[5], *more[2:]])
    return _promises(kind, set(options.split(",")))


def _promises(kind: str, options: set[str]) -> FileSystem:
    if kind in ("nfs", "nfs4"):
        local = {"nolock", "local_lock=all", "local_lock=flock"}
        # A client writes whole pages back, also what another host has written in them since.
        return FileSystem(kind, True, locks_reach=not options & local, is_coherent=False)
    if kind == "lustre":
        return FileSystem(kind, True, locks_reach="flock" in options, is_coherent=True)
    if kind in _LOCKING:
        return FileSystem(kind, True, locks_reach=True, is_coherent=True)
    is_fuse = kind.startswith("fuse") and kind not in ("fuseblk", "fusectl")
    if kind in _UNKNOWN or is_fuse:
        return FileSystem(kind, True, locks_reach=False, is_coherent=False)
    return FileSystem(kind, False, locks_reach=True, is_coherent=True)
