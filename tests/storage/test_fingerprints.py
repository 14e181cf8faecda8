import os
import re
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from drift_merge.errors import CheckpointError
from drift_merge.storage import fingerprints
from drift_merge.storage.checkpoint import open_checkpoint
from tests.checkpoints import Stored, make_pair, write_checkpoint
from tests.strategies import texts

EMPTY = "xxh3:99aa06d3014798d86001c324468d497f"  # XXH3-128 of nothing, as its specification says


def test_the_fingerprint_of_nothing_is_the_published_one() -> None:
    assert fingerprints.of_bytes(b"") == fingerprints.Fingerprint().text() == EMPTY


@given(st.binary(max_size=2000), st.lists(st.integers(0, 2000), max_size=5))
def test_a_fingerprint_does_not_depend_on_the_chunks(data: bytes, cuts: list[int]) -> None:
    fingerprint = fingerprints.Fingerprint()
    bounds = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    for begin, end in pairwise(bounds):
        fingerprint.update(memoryview(data)[begin:end])
    assert fingerprint.text() == fingerprints.of_bytes(data)
    assert re.fullmatch(r"xxh3:[0-9a-f]{32}", fingerprint.text())


@given(st.binary(min_size=1, max_size=200), st.data())
def test_a_flipped_bit_changes_the_fingerprint(data: bytes, choice: st.DataObject) -> None:
    changed = bytearray(data)
    changed[choice.draw(st.integers(0, len(data) - 1))] ^= 1 << choice.draw(st.integers(0, 7))
    assert fingerprints.of_bytes(bytes(changed)) != fingerprints.of_bytes(data)


@given(st.dictionaries(texts(max_size=5), st.integers() | texts(max_size=5), max_size=5))
def test_the_order_of_keys_does_not_matter(value: dict[str, object]) -> None:
    turned = dict(reversed(value.items()))
    assert fingerprints.of_json(value) == fingerprints.of_json(turned)
    assert fingerprints.of_fingerprints(
        {k: str(v) for k, v in value.items()}
    ) == fingerprints.of_fingerprints((k, str(v)) for k, v in turned.items())


def test_the_layout_does_not_depend_on_the_sharding(tmp_path: Path) -> None:
    one = make_pair(tmp_path / "one", layers=1)
    three = make_pair(tmp_path / "three", layers=1, num_shards=3)
    for a, b in zip(one, three, strict=True):
        layouts = [fingerprints.of_layout(open_checkpoint(str(path))) for path in (a, b)]
        assert layouts[0] == layouts[1]


@pytest.mark.parametrize("what", ["name", "dtype", "shape"])
def test_the_layout_depends_on_names_dtypes_and_shapes(what: str, tmp_path: Path) -> None:
    tensor = Stored("BF16", (2, 3), bytes(12))
    other = {
        "name": {"b": tensor},
        "dtype": {"a": tensor._replace(dtype="F16")},
        "shape": {"a": tensor._replace(shape=(3, 2))},
    }[what]
    paths = [
        write_checkpoint(tmp_path / "one", {"a": tensor}, {}),
        write_checkpoint(tmp_path / "two", other, {}),
    ]
    first, second = (fingerprints.of_layout(open_checkpoint(str(path))) for path in paths)
    assert first != second


def test_a_file_that_was_touched_is_noticed(tmp_path: Path) -> None:
    pair = make_pair(tmp_path, layers=1, num_shards=2)
    checkpoint = open_checkpoint(str(pair.mllm))
    before = fingerprints.of_files(checkpoint)
    assert fingerprints.of_files(open_checkpoint(str(pair.mllm))) == before
    os.utime(pair.mllm / "model-00002-of-00002.safetensors", ns=(0, 1))
    assert fingerprints.of_files(checkpoint) != before


def test_a_changed_config_is_noticed(tmp_path: Path) -> None:
    pair = make_pair(tmp_path, layers=1)
    before = fingerprints.of_files(open_checkpoint(str(pair.mllm)))
    config = (pair.mllm / "config.json").read_text()
    (pair.mllm / "config.json").write_text(config.replace('"silu"', '"gelu"'))
    assert fingerprints.of_files(open_checkpoint(str(pair.mllm))) != before


def test_a_shard_that_is_gone_is_a_checkpoint_error(tmp_path: Path) -> None:
    pair = make_pair(tmp_path, layers=1)
    checkpoint = open_checkpoint(str(pair.mllm))
    (pair.mllm / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be read"):
        fingerprints.of_files(checkpoint)
