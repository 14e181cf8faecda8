"""The safetensors header: strict reading and deterministic writing, without torch.

A file is 8 bytes (N, unsigned little-endian), N bytes of JSON, then the data. Every promise
of the header is checked against the file before a byte of data is trusted: its length, its
JSON, each dtype, shape and offset pair, no overlap, no hole, no byte too few or too many.

Format: https://github.com/huggingface/safetensors#format
"""

import json
import os
import struct
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

from drift_merge.errors import CheckpointError
from drift_merge.storage.folder.faults import cannot_open, refuse_pointer

MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library itself
MAX_COUNT = 2**63  # no file is larger, so no size or offset of an honest header is

DTYPE_BITS = {
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "U16": 16,
    "I16": 16,
    "U32": 32,
    "I32": 32,
    "U64": 64,
    "I64": 64,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "F8_E4M3": 8,
    "F8_E5M2": 8,
    "F8_E8M0": 8,
    "F16": 16,
    "BF16": 16,
    "F32": 32,
    "F64": 64,
    "C64": 64,
}


State = tuple[int, int, int]  # of a file: its number, size in bytes, time of change in ns


class TensorInfo(NamedTuple):
    """One tensor as its shard's header describes it; no data is read."""

    name: str  # as stored, e.g. "model.layers.0.mlp.up_proj.weight"
    dtype: str  # safetensors code, e.g. "BF16"
    shape: tuple[int, ...]  # () for a scalar
    shard: str  # file name inside the checkpoint directory
    start: int  # first byte of the data, counted from the start of the file
    size_bytes: int  # of the data alone

    @property
    def numel(self) -> int:
        """Number of elements; 1 for a scalar."""
        return prod(self.shape)


@dataclass(frozen=True, slots=True)
class ShardHeader:
    """Everything a shard says about itself."""

    shard: str  # file name inside the checkpoint directory
    file_bytes: int
    tensors: dict[str, TensorInfo]  # in the order of the header
    metadata: dict[str, str]  # `__metadata__`, empty when absent
    state: State | None = field(default=None, compare=False)  # of the file; None on the Hub


def header_length(first: bytes, *, shard: str, file_bytes: int) -> int:
    """Bytes from the start of the file to its first data byte, from the first 8 bytes.

    Args:
        first: at least the first 8 bytes of the file.
        shard: file name, for messages.
        file_bytes: size of the whole file.

    Raises:
        CheckpointError: the file is too short, or the length cannot be true.
    """
    if file_bytes < 8 or len(first) < 8:
        raise _broken(shard, f"the file has {file_bytes:,} bytes, too few for a header")
    (length,) = struct.unpack("<Q", first[:8])
    if length > MAX_HEADER_BYTES:
        raise _broken(
            shard, f"it claims a header of {length:,} bytes; at most {MAX_HEADER_BYTES:,} are legal"
        )
    if 8 + length > file_bytes:
        raise _broken(
            shard, f"it claims a header of {length:,} bytes, but the file has {file_bytes:,}"
        )
    return 8 + int(length)


def parse_header(data: bytes, *, shard: str, file_bytes: int) -> ShardHeader:
    """Parse and check a header.

    Args:
        data: the first `header_length(...)` bytes of the file, or more.
        shard: file name, for messages and for `TensorInfo.shard`.
        file_bytes: size of the whole file, to find truncation before any data is read.

    Raises:
        CheckpointError: naming the shard and the first promise that is broken.
    """
    begin = header_length(data, shard=shard, file_bytes=file_bytes)
    try:
        # Decoded here: json.loads would take UTF-16 and a byte order mark too, the format does not.
        text = data[8:begin].decode("utf-8")
        header = json.loads(text, object_pairs_hook=_unique_keys)
    except (ValueError, RecursionError) as error:
        raise _broken(shard, f"the header is not valid JSON ({error})") from error
    if not isinstance(header, dict):
        raise _broken(shard, "the header is not a JSON object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise _broken(shard, "__metadata__ is not a map from string to string")
    tensors = {name: _tensor(name, entry, shard, begin) for name, entry in header.items()}
    _check_cover(tensors.values(), shard, begin, file_bytes)
    return ShardHeader(shard, file_bytes, tensors, metadata)


def read_header(path: Path, shard: str) -> ShardHeader:
    """Read and check the header of a local file; `shard` is its name in messages."""
    try:
        with open(path, "rb") as file:
            status = os.fstat(file.fileno())
            file_bytes = status.st_size
            first = file.read(8)
            if first == b"version ":  # as a length, larger than any file
                refuse_pointer(shard, path)
            length = header_length(first, shard=shard, file_bytes=file_bytes)
            data = first + file.read(length - 8)
            header = parse_header(data, shard=shard, file_bytes=file_bytes)
            return replace(header, state=state_of(status))
    except OSError as error:
        raise cannot_open(shard, path, error) from error


def state_of(status: os.stat_result) -> State:
    """What tells that a file was changed or replaced."""
    return status.st_ino, status.st_size, status.st_mtime_ns


def encode_header(
    entries: Iterable[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str]
) -> tuple[bytes, dict[str, int]]:
    """The header of a new shard, and where each tensor's data starts in the file.

    Args:
        entries: (name, dtype code, shape) in the order of the data.
        metadata: becomes `__metadata__`.

    Returns:
        The first bytes of the file (length field included, padded with spaces to 8 bytes) and
        a map from name to the absolute offset of its data. Equal inputs give equal bytes.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    starts: dict[str, int] = {}
    at = 0
    for name, dtype, shape in entries:
        size = tensor_bytes(dtype, shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + size]}
        starts[name] = at
        at += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    begin = 8 + len(text)
    return struct.pack("<Q", len(text)) + text, {name: begin + s for name, s in starts.items()}


def tensor_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Size of the data of a tensor, in bytes, rounded up for dtypes below one byte."""
    return (prod(shape) * DTYPE_BITS[dtype] + 7) // 8


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        twice, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise ValueError(f"{_short(twice)} stands in it twice")
    return result


def _tensor(name: str, entry: Any, shard: str, begin: int) -> TensorInfo:
    if not name.isascii() and not _is_text(name):
        raise _broken(shard, f"the name {_short(name)} is not valid Unicode")
    if not isinstance(entry, dict):
        raise _broken(shard, f"the entry of {name} is not an object")
    get = entry.get
    dtype, shape, offsets = get("dtype"), get("shape"), get("data_offsets")
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise _broken(shard, f"{name} has the unknown dtype {_short(dtype)}; known: {_names()}")
    if not isinstance(shape, list) or not _is_counts(shape):
        raise _broken(shard, f"{name} has the shape {_short(shape)}; expected a list of counts")
    if not isinstance(offsets, list) or not _is_pair(offsets) or offsets[0] > offsets[1]:
        got = _short(offsets)
        raise _broken(shard, f"{name} has the data offsets {got}; expected [begin, end]")
    sizes = tuple(shape)
    expected = tensor_bytes(dtype, sizes)
    size = offsets[1] - offsets[0]
    if size != expected:
        raise _broken(
            shard,
            f"{name} is {dtype} {_short(sizes)} and needs {_count(expected)} bytes, "
            f"but its offsets span {size:,}",
        )
    return TensorInfo(name, dtype, sizes, shard, begin + offsets[0], size)


def _is_counts(value: list[Any]) -> bool:
    return not [v for v in value if type(v) is not int or not 0 <= v < MAX_COUNT]  # True is none


def _is_text(name: str) -> bool:
    """Whether a name can be written as UTF-8: JSON can smuggle in half a surrogate pair."""
    return not any("\ud800" <= letter <= "\udfff" for letter in name)


def _short(value: Any) -> str:
    """What a hostile header says, in at most a line."""
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:100]}..."


def _is_pair(value: list[Any]) -> bool:
    return len(value) == 2 and _is_counts(value)


def _check_cover(tensors: Iterable[TensorInfo], shard: str, begin: int, file_bytes: int) -> None:
    at = begin
    last = "the header"
    for info in sorted(tensors, key=lambda t: (t.start, t.size_bytes)):
        if info.start < at:
            raise _broken(shard, f"the data of {info.name} overlaps that of {last}")
        if info.start > at:
            raise _broken(shard, f"{info.start - at:,} bytes before {info.name} belong to nobody")
        at, last = info.start + info.size_bytes, info.name
    if at > file_bytes:
        raise CheckpointError(
            f"{shard} is truncated: its header promises {at:,} bytes, the file has {file_bytes:,}.",
            remedy=f"Delete {shard} and download it again.",
        )
    if at < file_bytes:
        raise _broken(shard, f"{file_bytes - at:,} bytes after the last tensor belong to nobody")


def _count(value: int) -> str:
    """A number for a message; Python refuses to print more than 4,300 digits."""
    return f"{value:,}" if value < MAX_COUNT else "more than 2**63"


def _names() -> str:
    return ", ".join(DTYPE_BITS)


def _broken(shard: str, what: str) -> CheckpointError:
    return CheckpointError(
        f"{shard} is not a valid safetensors file: {what}.",
        remedy=f"Delete {shard} and download or convert it again.",
    )
