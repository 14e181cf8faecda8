from pathlib import Path

import pytest

from drift_merge.errors import CheckpointError
from drift_merge.storage.checkpoint import open_prior_checkpoint
from drift_merge.storage.forms.compressed import (
    CODES,
    describe_stored,
    find_scales,
    scale_name,
    stored_as,
    stored_fingerprints,
)
from drift_merge.storage.headers import ShardHeader, TensorInfo, read_header, tensor_bytes
from drift_merge.storage.hub import artifacts
from drift_merge.storage.sources import Source
from tests.checkpoints import Stored, write_shard


def info(name: str, dtype: str, shape: tuple[int, ...]) -> TensorInfo:
    return TensorInfo(name, dtype, shape, "shard", 0, tensor_bytes(dtype, shape))


@pytest.mark.parametrize("code", sorted(CODES))
@pytest.mark.parametrize(
    ("shape", "is_compressed"),
    [
        ((), False),
        ((5,), False),
        ((4096,), False),
        ((0, 5), False),
        ((5, 0), False),
        ((3, 4), False),  # codes and scales would take as much as 16 bits
        ((3, 5), True),
        ((1, 4096), True),
        ((2, 3, 5), True),
        ((2, 3, 4), False),
    ],
)
def test_only_what_becomes_smaller_than_in_16_bits_is_compressed(
    code: str, shape: tuple[int, ...], is_compressed: bool
) -> None:
    for source, plain in (("BF16", "BF16"), ("F16", "F16"), ("F32", "BF16"), ("", "BF16")):
        assert stored_as(shape, code, source) == (code if is_compressed else plain)


def test_scales_are_found_by_name_and_plain_tensors_need_none() -> None:
    tensors = {
        "a": info("a", "I8", (3, 5)),
        "a:scale": info("a:scale", "F32", (3,)),
        "b": info("b", "BF16", (3, 5)),
        "c": info("c", "F8_E4M3", (2, 3, 5)),
        "c:scale": info("c:scale", "F32", (2, 3)),
    }
    assert find_scales(tensors, "prior") == {"a": "a:scale", "c": "c:scale"}
    assert find_scales({"b": tensors["b"]}, "prior") == {}


@pytest.mark.parametrize(
    "scales",
    [
        None,
        ("BF16", (3,)),
        ("F32", (3, 1)),
        ("F32", (4,)),
        ("F32", ()),
    ],
)
def test_missing_or_other_scales_are_refused(scales: tuple[str, tuple[int, ...]] | None) -> None:
    tensors = {"a": info("a", "I8", (3, 5))}
    if scales is not None:
        tensors["a:scale"] = info("a:scale", *scales)
    with pytest.raises(CheckpointError, match=r"prior: a is I8 and needs scales a:scale of F32"):
        find_scales(tensors, "prior")


@pytest.mark.parametrize("shape", [(), (5,)])
def test_codes_of_a_scalar_or_a_vector_are_refused(shape: tuple[int, ...]) -> None:
    tensors = {"a": info("a", "I8", shape), "a:scale": info("a:scale", "F32", ())}
    with pytest.raises(CheckpointError, match="needs scales"):
        find_scales(tensors, "prior")


def test_scales_without_codes_are_refused() -> None:
    tensors = {"a": info("a", "BF16", (3, 5)), "a:scale": info("a:scale", "F32", (3,))}
    with pytest.raises(CheckpointError, match="a:scale is the scale of no compressed tensor"):
        find_scales(tensors, "prior")


def test_fingerprints_and_descriptions_of_a_manifest_name_the_scales_too() -> None:
    entries = {
        "a": {"dtype": "I8", "shape": [3, 5], "own": "1", "fingerprint_scale": "2"},
        "b": {"dtype": "BF16", "shape": [7], "own": "3"},
    }
    assert stored_fingerprints(entries, "own") == {"a": "1", scale_name("a"): "2", "b": "3"}
    assert describe_stored(entries) == {
        "a": ("I8", (3, 5)),
        "a:scale": ("F32", (3,)),
        "b": ("BF16", (7,)),
    }


def test_scales_are_known_from_headers_of_the_hub_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_shard(
        tmp_path / "prior-00001-of-00001.safetensors",
        {"a": Stored("I8", (3, 5), bytes(15)), "a:scale": Stored("F32", (3,), bytes(12))},
    )
    header = read_header(tmp_path / "prior-00001-of-00001.safetensors", "prior")

    def headers(source: Source) -> tuple[Source, list[ShardHeader], Path]:
        return source, [header], tmp_path / "prior.json"

    monkeypatch.setattr(artifacts, "fetch_prior_headers", headers)
    opened = open_prior_checkpoint("org/name", headers_only=True)
    assert opened.path is None
    assert opened.scales == {"a": "a:scale"}
    assert open_prior_checkpoint(str(tmp_path)).scales == opened.scales
