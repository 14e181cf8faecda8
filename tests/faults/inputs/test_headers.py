"""Shards whose headers lie, through the real command line."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoints import (
    Pair,
    make_pair,
    shard_bytes,
)
from tests.faults.harness import assert_refusal, command, refused, run
from tests.faults.inputs.damage import (
    COMMANDS,
    ROLES,
    SHARD,
    Break,
    damaged,
    header_of,
    tensor_of,
)


def with_header(change: Callable[[dict[str, Any]], Any]) -> Break:
    def damage(directory: Path) -> None:
        header, data = header_of(directory / SHARD)
        changed = change(header)
        (directory / SHARD).write_bytes(shard_bytes(changed if changed else header, data))

    return damage


def with_entry(**changes: Any) -> Break:
    """Change the entry of the first tensor of the first shard."""
    return with_header(lambda header: header[tensor_of(header)].update(changes))


def with_length(length: Callable[[int, int], int]) -> Break:
    """Make the header length lie, given the true one and the size of the file."""

    def damage(directory: Path) -> None:
        raw = (directory / SHARD).read_bytes()
        (true,) = struct.unpack("<Q", raw[:8])
        (directory / SHARD).write_bytes(struct.pack("<Q", length(true, len(raw))) + raw[8:])

    return damage


def with_bytes(change: Callable[[bytes], bytes]) -> Break:
    def damage(directory: Path) -> None:
        (directory / SHARD).write_bytes(change((directory / SHARD).read_bytes()))

    return damage


def duplicate(directory: Path) -> None:
    header, data = header_of(directory / SHARD)
    name = json.dumps(tensor_of(header))
    entry = json.dumps(header[tensor_of(header)])
    text = json.dumps(header)[:-1] + f", {name}: {entry}}}"
    (directory / SHARD).write_bytes(shard_bytes(text.encode(), data))


def shift(by: int, number: int = 1) -> Break:
    """Move the offsets of one tensor, keeping its size."""

    def change(header: dict[str, Any]) -> None:
        entry = header[list(header)[number]]
        entry["data_offsets"] = [offset + by for offset in entry["data_offsets"]]

    return with_header(change)


def hole(header: dict[str, Any]) -> None:
    last = header[list(header)[-1]]
    last["data_offsets"] = [offset + 64 for offset in last["data_offsets"]]


HEADERS: dict[str, tuple[Break, str]] = {
    "truncated data": (with_bytes(lambda raw: raw[:-100]), "is truncated"),
    "truncated header": (with_bytes(lambda raw: raw[:100]), "claims a header of"),
    "eight bytes": (with_bytes(lambda raw: raw[:8]), "claims a header of"),
    "seven bytes": (with_bytes(lambda raw: raw[:7]), "too few for a header"),
    "no bytes": (with_bytes(lambda _: b""), "too few for a header"),
    "trailing bytes": (with_bytes(lambda raw: raw + b"\0" * 10), "10 bytes after the last tensor"),
    "length beyond the file": (with_length(lambda _, size: size), "claims a header of"),
    "length of 100 MB and one": (with_length(lambda *_: 100_000_001), "at most 100,000,000"),
    "length of 2**64 - 1": (with_length(lambda *_: 2**64 - 1), "at most 100,000,000"),
    "length of 0": (with_length(lambda *_: 0), "not valid JSON"),
    "length too short": (with_length(lambda true, _: true - 16), "not valid JSON"),
    "length too long": (with_length(lambda true, _: true + 16), "not valid JSON"),
    "not JSON": (with_header(lambda _: b"{'a': 1}"), "not valid JSON"),
    "not UTF-8": (with_header(lambda _: b'{"\xff": 1}'), "not valid JSON"),
    "UTF-16": (with_header(lambda h: json.dumps(h).encode("utf-16")), "not valid JSON"),
    "deeply nested": (with_header(lambda _: b"[" * 100_000), "not valid JSON"),
    "not an object": (with_header(lambda _: b"[1, 2]"), "not a JSON object"),
    "a key twice": (duplicate, "stands in it twice"),
    "metadata of numbers": (
        with_header(lambda h: h.update(__metadata__={"format": 1})),
        "__metadata__ is not a map",
    ),
    "an entry that is no object": (
        with_header(lambda h: h.update({tensor_of(h): [1]})),
        "is not an object",
    ),
    "half a surrogate pair": (
        with_header(lambda h: h.update({"\ud800": h.pop(tensor_of(h))})),
        "not valid Unicode",
    ),
    "unknown dtype": (with_entry(dtype="BF17"), "unknown dtype 'BF17'"),
    "dtype of another type": (with_entry(dtype=["BF16"]), "unknown dtype ['BF16']"),
    "no dtype": (with_header(lambda h: h[tensor_of(h)].pop("dtype") * 0), "unknown dtype None"),
    "a negative shape": (with_entry(shape=[-16, -16]), "[-16, -16]; expected a list of counts"),
    "a shape of floats": (with_entry(shape=[16.0, 16.0]), "expected a list of counts"),
    "a shape of booleans": (with_entry(shape=[True, True]), "expected a list of counts"),
    "a shape beyond 2**63": (with_entry(shape=[2**63]), "expected a list of counts"),
    "a shape of a number": (with_entry(shape=16), "the shape 16"),
    "a shape of huge numbers": (with_entry(shape=[2**62] * 400), "more than 2**63 bytes"),
    "a shape of another size": (with_entry(shape=[3, 5]), "needs 30 bytes, but its offsets span"),
    "offsets the wrong way": (with_entry(data_offsets=[64, 0]), "expected [begin, end]"),
    "negative offsets": (with_entry(data_offsets=[-512, 0]), "expected [begin, end]"),
    "float offsets": (with_entry(data_offsets=[0.0, 512.0]), "expected [begin, end]"),
    "three offsets": (with_entry(data_offsets=[0, 1, 2]), "expected [begin, end]"),
    "overlapping offsets": (shift(-64, number=2), "overlaps that of"),
    "offsets beyond the file": (shift(10**6), "belong to nobody"),
    "a hole": (with_header(hole), "64 bytes before"),
}


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("fault", HEADERS)
def test_a_broken_shard_is_refused_by_name(
    fault: str, role: str, whole: Pair, tmp_path: Path
) -> None:
    damage, mention = HEADERS[fault]
    pair = damaged(whole, role, tmp_path, damage)
    for name in COMMANDS:
        refused(command(name, pair, tmp_path / "out"), 5, SHARD, mention)


def test_terminal_codes_in_a_name_do_not_reach_the_terminal(tmp_path: Path) -> None:
    pair = make_pair(tmp_path, layers=1)
    header, data = header_of(pair.mllm / "model.safetensors")
    entry = header.pop(tensor_of(header))
    header = {"\x1b[2Jgone": entry | {"dtype": "EVIL"}} | header
    (pair.mllm / "model.safetensors").write_bytes(shard_bytes(header, data))
    result = run(*command("align", pair, tmp_path / "out"))
    assert_refusal(result, 5, [r"\x1b[2Jgone"])
    assert "\x1b" not in result.stderr
