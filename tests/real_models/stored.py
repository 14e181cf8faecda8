"""Read what a checkpoint or a prior has on disk, without the package's help."""

import json
from pathlib import Path

import numpy as np

Stored = tuple[str, tuple[int, ...], np.ndarray]  # dtype code, shape, bytes


def read(path: Path) -> dict[str, Stored]:
    """Map the tensors of every shard in a directory; names are unique across shards."""
    tensors: dict[str, Stored] = {}
    for shard in sorted(path.glob("*.safetensors")):
        data = np.memmap(shard, dtype=np.uint8, mode="r")
        start = 8 + int(data[:8].view("<u8")[0])
        header = json.loads(data[8:start].tobytes())
        header.pop("__metadata__", None)
        assert not tensors.keys() & header.keys()
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            content = data[start + begin : start + end]
            tensors[name] = (entry["dtype"], tuple(entry["shape"]), content)
    return tensors


def float64(stored: Stored) -> np.ndarray:
    """Decode one tensor."""
    dtype, shape, data = stored
    if dtype == "BF16":
        values = (data.view("<u2").astype(np.uint32) << 16).view(np.float32)
    else:
        values = data.view({"F32": "<f4", "F16": "<f2"}[dtype])
    return values.reshape(shape).astype(np.float64)


def assert_same_tensors(left: Path, right: Path) -> None:
    a, b = read(left), read(right)
    assert a.keys() == b.keys()
    for name in a:
        assert a[name][:2] == b[name][:2], name
        assert np.array_equal(a[name][2], b[name][2]), name


def assert_same_sidecars(merged: Path, mllm: Path) -> None:
    """Require that every file of the mllm that holds no weights is in the merge unchanged."""
    names = {file.name for file in mllm.iterdir() if ".safetensors" not in file.name}
    for name in names - {"README.md", "drift_merge.json"}:
        assert (merged / name).read_bytes() == (mllm / name).read_bytes(), name
