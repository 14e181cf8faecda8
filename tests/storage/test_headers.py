"""The header reader and writer, against the safetensors library itself."""

import json
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.numpy import save

from drift_merge.errors import CheckpointError
from drift_merge.storage.headers import (
    DTYPE_BITS,
    MAX_HEADER_BYTES,
    encode_header,
    header_length,
    parse_header,
    read_header,
    tensor_bytes,
)
from tests.checkpoints import shard_bytes
from tests.strategies import texts

BYTE_DTYPES = ["BOOL", "U8", "I16", "F16", "BF16", "F32", "I64", "F64", "F8_E4M3"]

names = texts(min_size=1, max_size=20).filter(lambda name: name != "__metadata__")
shapes = st.lists(st.integers(0, 5), max_size=4).map(tuple)
entries = st.dictionaries(names, st.tuples(st.sampled_from(BYTE_DTYPES), shapes), max_size=6).map(
    lambda found: [(name, dtype, shape) for name, (dtype, shape) in found.items()]
)
metadata = st.dictionaries(names, texts(max_size=5).filter(str.isprintable), max_size=3)


def parse(raw: bytes) -> Any:
    return parse_header(raw, shard="a.safetensors", file_bytes=len(raw))


def library_accepts(raw: bytes) -> bool:
    try:
        safetensors.deserialize(raw)
    except Exception:
        return False
    return True


def is_accepted(raw: bytes) -> bool:
    try:
        parse(raw)
    except CheckpointError:
        return False
    return True


@given(entries, metadata)
@example([], {})
@example([("scalar", "F32", ()), ("empty", "BF16", (0, 5))], {"format": "pt"})
def test_what_is_written_is_read_back(
    written: list[tuple[str, str, tuple[int, ...]]], extra: dict[str, str]
) -> None:
    header, starts = encode_header(written, extra)
    data = sum(tensor_bytes(dtype, shape) for _, dtype, shape in written)
    found = parse(header + bytes(data))
    assert [(t.name, t.dtype, t.shape) for t in found.tensors.values()] == written
    assert {name: t.start for name, t in found.tensors.items()} == starts
    assert found.metadata == extra
    assert len(header) % 8 == 0
    assert header_length(header, shard="a", file_bytes=len(header)) == len(header)


@given(entries)
def test_the_library_reads_what_is_written(
    written: list[tuple[str, str, tuple[int, ...]]],
) -> None:
    header, starts = encode_header(written, {"format": "pt"})
    sizes = {name: tensor_bytes(dtype, shape) for name, dtype, shape in written}
    data = bytes(i % 251 for i in range(sum(sizes.values())))
    raw = header + data
    found = dict(safetensors.deserialize(raw))
    assert {n: (t["dtype"], tuple(t["shape"])) for n, t in found.items()} == {
        name: (dtype, shape) for name, dtype, shape in written
    }
    for name, tensor in found.items():
        assert tensor["data"] == raw[starts[name] : starts[name] + sizes[name]]


NUMPY = {
    "BOOL": np.bool_,
    "U8": np.uint8,
    "I16": np.int16,
    "F16": np.float16,
    "F32": np.float32,
    "I64": np.int64,
    "F64": np.float64,
}


@given(st.dictionaries(names, st.tuples(st.sampled_from(list(NUMPY)), shapes)), metadata)
def test_what_the_library_writes_is_read(
    written: dict[str, tuple[str, tuple[int, ...]]], extra: dict[str, str]
) -> None:
    tensors = {name: np.zeros(shape, NUMPY[dtype]) for name, (dtype, shape) in written.items()}
    found = parse(save(tensors, extra or None))
    assert {name: (t.dtype, t.shape) for name, t in found.tensors.items()} == written
    assert found.metadata == extra


def test_the_bytes_of_a_header_are_these() -> None:
    header, starts = encode_header([("b", "BF16", (2, 3)), ("a", "F32", ())], {"format": "pt"})
    text = (
        b'{"__metadata__":{"format":"pt"},'
        b'"b":{"dtype":"BF16","shape":[2,3],"data_offsets":[0,12]},'
        b'"a":{"dtype":"F32","shape":[],"data_offsets":[12,16]}}'
    )
    assert header == struct.pack("<Q", 144) + text.ljust(144)
    assert starts == {"b": 152, "a": 164}


@given(entries.filter(bool), st.data())
def test_a_file_cut_anywhere_is_refused(
    written: list[tuple[str, str, tuple[int, ...]]], data: st.DataObject
) -> None:
    header, _ = encode_header(written, {})
    raw = header + bytes(sum(tensor_bytes(dtype, shape) for _, dtype, shape in written))
    cut = data.draw(st.integers(0, len(raw) - 1))
    with pytest.raises(CheckpointError, match=r"a\.safetensors"):
        parse(raw[:cut])


numbers = st.integers(-2, 12) | st.sampled_from([2**31, 2**63, 2**64, True, None, 1.0, "2"])
hostile = st.dictionaries(
    st.sampled_from(["a", "b", "c", "__metadata__"]),
    st.fixed_dictionaries(
        {},
        optional={
            "dtype": st.sampled_from(["U8", "F32", "F4", "BF17", None, 3]),
            "shape": st.lists(numbers, max_size=3) | numbers,
            "data_offsets": st.lists(numbers, max_size=3) | numbers,
        },
    )
    | numbers,
    max_size=3,
)
plausible = st.dictionaries(
    st.sampled_from(["a", "b", "c"]),
    st.builds(
        lambda dtype, shape, begin, size: {
            "dtype": dtype,
            "shape": shape,
            "data_offsets": [begin, begin + size],
        },
        st.sampled_from(["U8", "U16"]),
        st.lists(st.integers(0, 3), max_size=2),
        st.sampled_from([0, 1, 2, 4, 6, 8]),
        st.sampled_from([0, 1, 2, 4, 6]),
    ),
    max_size=3,
)


@given(hostile | plausible, st.integers(0, 12))
@example({"a": {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]}}, 2)
@example({"a": {"dtype": "U8", "shape": [2**63, 0], "data_offsets": [0, 0]}}, 0)
def test_a_header_is_accepted_only_if_the_library_accepts_it(
    header: dict[str, Any], data_bytes: int
) -> None:
    raw = shard_bytes(header, bytes(data_bytes))
    assert not is_accepted(raw) or library_accepts(raw)


@given(plausible, st.integers(0, 12))
def test_a_plain_header_is_accepted_whenever_the_library_accepts_it(
    header: dict[str, Any], data_bytes: int
) -> None:
    raw = shard_bytes(header, bytes(data_bytes))
    assert is_accepted(raw) == library_accepts(raw)


@given(st.binary(max_size=200))
def test_noise_is_refused_and_nothing_else_is_raised(noise: bytes) -> None:
    assert not is_accepted(noise) or library_accepts(noise)
    raw = shard_bytes(noise)
    assert not is_accepted(raw) or library_accepts(raw)


@given(st.data())
def test_a_flipped_byte_never_raises_anything_but_a_checkpoint_error(data: st.DataObject) -> None:
    header, _ = encode_header([("a.weight", "BF16", (2, 3)), ("b", "F32", (4,))], {"x": "y"})
    raw = bytearray(header + bytes(28))
    raw[data.draw(st.integers(0, len(header) - 1))] = data.draw(st.integers(0, 255))
    assert not is_accepted(bytes(raw)) or library_accepts(bytes(raw))


def test_a_hostile_header_is_read_in_linear_time() -> None:
    """Half a million names, the last one twice: a quadratic search would take hours."""
    text = b"{" + b",".join(b'"%d":1' % i for i in range(500_000)) + b',"499999":1}'
    with pytest.raises(CheckpointError, match="'499999' stands in it twice"):
        parse(shard_bytes(text))


def test_a_hostile_value_does_not_flood_the_terminal() -> None:
    for entry in ({"dtype": "X" * 10**6}, {"dtype": "U8", "shape": ["X" * 10**6]}):
        with pytest.raises(CheckpointError) as caught:
            parse(shard_bytes({"a": entry}))
        assert len(caught.value.message) < 1000


def test_the_length_limit_is_that_of_the_library() -> None:
    for length, mention in (
        (MAX_HEADER_BYTES, "but the file has"),
        (MAX_HEADER_BYTES + 1, "legal"),
    ):
        with pytest.raises(CheckpointError, match=mention):
            header_length(struct.pack("<Q", length), shard="a", file_bytes=1000)


def test_every_dtype_of_the_format_has_its_size() -> None:
    assert {"F4", "F6_E2M3", "F8_E8M0", "BF16", "C64"} <= set(DTYPE_BITS)
    assert tensor_bytes("F4", (3,)) == 2
    assert tensor_bytes("F6_E2M3", (4,)) == 3
    assert tensor_bytes("BF16", ()) == 2
    assert tensor_bytes("F64", (0, 7)) == 0


def test_reading_a_header_reads_no_data(tmp_path: Path) -> None:
    """A terabyte of holes: only the first bytes can have been read."""
    size = 2**40
    header, _ = encode_header([("a", "U8", (size,))], {})
    path = tmp_path / "a.safetensors"
    with open(path, "wb") as file:
        file.write(header)
        file.truncate(len(header) + size)
    assert read_header(path, "a.safetensors").tensors["a"].size_bytes == size


def test_a_file_that_is_not_there_or_a_folder_is_a_checkpoint_error(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing"):
        with pytest.raises(CheckpointError, match="cannot be read") as caught:
            read_header(path, "a.safetensors")
        assert str(path) in caught.value.remedy


def test_neither_torch_nor_numpy_is_imported() -> None:
    code = (
        "import sys, json, drift_merge.storage.checkpoint, drift_merge.storage.output, "
        "drift_merge.storage.mapped; print(json.dumps(sorted(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert not {"torch", "numpy", "huggingface_hub"} & set(json.loads(run.stdout))
