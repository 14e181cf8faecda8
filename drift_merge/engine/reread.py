"""Compares the bytes on the disk with the fingerprints taken when they were written.

Two uses: before an output is published, and by `verify`, at any later time, from its manifest.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from drift_merge.engine.ranks.division import part_of
from drift_merge.errors import CheckpointError, VerificationError
from drift_merge.storage.fingerprints import WINDOW_BYTES, Fingerprint
from drift_merge.storage.headers import ShardHeader, TensorInfo, read_header
from drift_merge.storage.ranks.meeting import ALONE, Ranks

Inspect = Callable[[TensorInfo, memoryview], None]  # sees every window of every tensor


@dataclass(frozen=True, slots=True)
class ReadBack:
    """What a re-reading saw."""

    num_tensors: int
    size_bytes: int


def read_shards(directory: Path, names: Iterable[str]) -> dict[str, ShardHeader]:
    """Read the headers of the shards that a manifest names.

    Raises:
        VerificationError: a shard is missing or broken, named.
    """
    headers = {}
    for name in names:
        if not (directory / name).is_file():
            raise VerificationError(
                f"{name} is missing from {directory}.",
                remedy="Compute it again, or download the missing file.",
            )
        try:
            headers[name] = read_header(directory / name, name)
        except CheckpointError as error:
            raise VerificationError(error.message, remedy=error.remedy) from error
    return headers


def reread(
    directory: Path,
    headers: Mapping[str, ShardHeader],
    fingerprints: Mapping[str, str],
    *,
    threads: int,
    inspect: Inspect | None = None,
    progress: Callable[[int], None] = lambda _: None,
    ranks: Ranks = ALONE,
) -> ReadBack:
    """Compare every tensor's bytes with its fingerprint.

    Args:
        directory: holds the shards.
        headers: of every shard, by file name.
        fingerprints: by tensor name; exactly the tensors that must be there.
        threads: readers.
        inspect: called with every window of data as well, from the readers.
        progress: called from the readers with the bytes read.
        ranks: the processes that share the reading; `inspect` sees what is read by this one.

    Raises:
        VerificationError: a tensor is missing, unknown, or differs; the first one in the order
            of the files is named.
    """
    infos = [info for header in headers.values() for info in header.tensors.values()]
    _same_names({info.name for info in infos}, set(fingerprints), directory)
    part = part_of([info.size_bytes for info in infos], ranks.rank, ranks.size)
    found = _differing(directory, infos[part], fingerprints, threads, inspect, progress)
    by_rank = ranks.gather(found)
    _refuse(directory, [each for found in by_rank for each in found], fingerprints)
    return ReadBack(len(infos), sum(info.size_bytes for info in infos))


def compare(
    directory: Path,
    infos: Sequence[TensorInfo],
    fingerprints: Mapping[str, str],
    *,
    threads: int,
    inspect: Inspect | None = None,
    progress: Callable[[int], None] = lambda _: None,
) -> None:
    """Read some tensors back and compare their bytes with their fingerprints; see `reread`."""
    found = _differing(directory, infos, fingerprints, threads, inspect, progress)
    _refuse(directory, found, fingerprints)


def _differing(
    directory: Path,
    infos: Sequence[TensorInfo],
    fingerprints: Mapping[str, str],
    threads: int,
    inspect: Inspect | None,
    progress: Callable[[int], None],
) -> list[list[str]]:
    """Name, shard and fingerprint of each tensor that differs."""

    def check(info: TensorInfo) -> str | None:
        found = _fingerprint(directory, info, inspect, progress)
        return None if found == fingerprints[info.name] else found

    if threads == 1:
        results = [check(info) for info in infos]
    else:
        with ThreadPoolExecutor(threads) as pool:
            results = list(pool.map(check, infos))
    return [[i.name, i.shard, found] for i, found in zip(infos, results, strict=True) if found]


def _refuse(directory: Path, wrong: list[list[str]], fingerprints: Mapping[str, str]) -> None:
    if wrong:
        name, shard, found = wrong[0]
        more = f" {len(wrong) - 1:,} more tensors differ too." if len(wrong) > 1 else ""
        raise VerificationError(
            f"{name} in {directory / shard} differs from its fingerprint: "
            f"expected {fingerprints[name]}, got {found}.{more}",
            remedy="It was changed or damaged after it was written: make or download it again.",
        )


def _same_names(found: set[str], expected: set[str], directory: Path) -> None:
    if found == expected:
        return
    missing, extra = sorted(expected - found), sorted(found - expected)
    first = f"{missing[0]} is missing" if missing else f"{extra[0]} is not in the manifest"
    raise VerificationError(
        f"{directory}: {first} ({len(missing):,} tensors missing, {len(extra):,} unknown).",
        remedy="The shards and the manifest are of different runs: make or download both again.",
    )


def _fingerprint(
    directory: Path,
    info: TensorInfo,
    inspect: Inspect | None,
    progress: Callable[[int], None],
) -> str:
    fingerprint = Fingerprint()
    if info.size_bytes == 0:
        return fingerprint.text()
    window = memoryview(bytearray(min(info.size_bytes, WINDOW_BYTES)))
    with open(directory / info.shard, "rb", buffering=0) as file:
        file.seek(info.start)
        left = info.size_bytes
        while left:
            piece = window[: min(left, len(window))]
            filled = 0
            while filled < len(piece):
                count = file.readinto(piece[filled:])
                if not count:
                    return "nothing: the file is too short"
                filled += count
            fingerprint.update(piece)
            if inspect is not None:
                inspect(info, piece)
            progress(len(piece))
            left -= len(piece)
    return fingerprint.text()
