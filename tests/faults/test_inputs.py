"""Damaged, hostile and wrong inputs, each through the real command line."""

import json
import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.checkpoints import (
    HIDDEN,
    INTERMEDIATE,
    Pair,
    Stored,
    make_pair,
    read_shard,
    read_tensors,
    shard_bytes,
    store,
    text_shapes,
    write_index,
    write_shard,
)
from tests.faults.harness import assert_refusal, command, refused, run

COMMANDS = ("align", "compute", "linear")
ROLES = ("reasoner", "mllm")
Q = "model.layers.0.self_attn.q_proj.weight"
K = "model.layers.0.self_attn.k_proj.weight"
V = "model.layers.0.self_attn.v_proj.weight"
NORM = "model.layers.0.input_layernorm.weight"
SHARD = "model-00001-of-00002.safetensors"
OTHER = "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"

Break = Callable[[Path], None]  # damages the checkpoint in a directory


def header_of(path: Path) -> tuple[dict[str, Any], bytes]:
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def with_header(change: Callable[[dict[str, Any]], Any]) -> Break:
    def damage(directory: Path) -> None:
        header, data = header_of(directory / SHARD)
        changed = change(header)
        (directory / SHARD).write_bytes(shard_bytes(changed if changed else header, data))

    return damage


def with_entry(**changes: Any) -> Break:
    """Change the entry of the first tensor of the first shard."""
    return with_header(lambda header: header[tensor_of(header)].update(changes))


def tensor_of(header: dict[str, Any]) -> str:
    return next(name for name in header if name != "__metadata__")


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


def with_index(change: Callable[[dict[str, Any]], Any]) -> Break:
    def damage(directory: Path) -> None:
        weight_map = json.loads((directory / INDEX).read_text())["weight_map"]
        change(weight_map)
        write_index(directory, weight_map)

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


def second_copy(directory: Path) -> None:
    """The tensors of one shard once more in the other, as a botched conversion leaves them."""
    first, second = directory / SHARD, directory / OTHER
    write_shard(second, read_shard(second) | read_shard(first))


def both(directory: Path) -> None:
    write_shard(directory / "model.safetensors", read_shard(directory / SHARD))


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


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return make_pair(tmp_path_factory.mktemp("whole"), layers=1, num_shards=2)


def damaged(whole: Pair, role: str, directory: Path, damage: Break) -> Pair:
    """A pair whose damaged side is a copy, and the other the whole one."""
    source = getattr(whole, role)
    target = directory / role
    target.mkdir()
    for path in source.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    damage(target)
    return whole._replace(**{role: target})


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("fault", HEADERS)
def test_a_broken_shard_is_refused_by_name(
    fault: str, role: str, whole: Pair, tmp_path: Path
) -> None:
    damage, mention = HEADERS[fault]
    pair = damaged(whole, role, tmp_path, damage)
    for name in COMMANDS:
        refused(command(name, pair, tmp_path / "out"), 5, SHARD, mention)


INDEXES: dict[str, tuple[Break, tuple[str, ...]]] = {
    "a missing shard": (lambda d: (d / OTHER).unlink(), (INDEX, "missing shard", OTHER)),
    "a file in the parent": (
        with_index(lambda m: m.update({Q: "../secret.safetensors"})),
        (INDEX, "'../secret.safetensors'", "not a plain path below its own directory"),
    ),
    "an absolute path": (
        with_index(lambda m: m.update({Q: "/tmp/secret.safetensors"})),
        (INDEX, "not a plain path below its own directory"),
    ),
    "a path with backslashes": (
        with_index(lambda m: m.update({Q: "..\\secret.safetensors"})),
        (INDEX, "not a plain path below its own directory"),
    ),
    "a path through the parent": (
        with_index(lambda m: m.update({Q: "a/../../secret.safetensors"})),
        (INDEX, "not a plain path below its own directory"),
    ),
    "a drive letter": (
        with_index(lambda m: m.update({Q: "C:/secret.safetensors"})),
        (INDEX, "not a plain path below its own directory"),
    ),
    "a pickle": (with_index(lambda m: m.update({Q: "a.bin"})), (INDEX, "'a.bin'")),
    "a number": (with_index(lambda m: m.update({Q: 3})), (INDEX, Q)),
    "the wrong shard": (
        with_index(lambda m: m.update({Q: OTHER if m[Q] == SHARD else SHARD})),
        (INDEX, Q, "but it is not"),
    ),
    "a tensor that no shard has": (
        with_index(lambda m: m.update({"model.extra": SHARD})),
        (INDEX, "model.extra", SHARD),
    ),
    "nothing": (with_index(lambda m: m.clear()), (INDEX, "empty weight_map")),
    "a tensor in two shards": (second_copy, ("is in two shards", SHARD, OTHER)),
    "no JSON": (lambda d: (d / INDEX).write_text("{") and None, (INDEX, "is not JSON")),
    "a tensor twice": (
        lambda d: (
            (d / INDEX).write_text('{"weight_map": {"a": "b.safetensors", "a": "c.safetensors"}}')
            and None
        ),
        (INDEX, "lists 'a' twice"),
    ),
    "a single file beside it": (both, ("both model.safetensors and", INDEX)),
    "a shard that links to itself": (
        lambda d: (d / OTHER).unlink() or (d / OTHER).symlink_to(OTHER),
        (INDEX, "missing shard", OTHER),
    ),
}


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("fault", INDEXES)
def test_a_broken_index_is_refused_by_name(
    fault: str, role: str, whole: Pair, tmp_path: Path
) -> None:
    damage, mentions = INDEXES[fault]
    pair = damaged(whole, role, tmp_path, damage)
    for name in COMMANDS:
        refused(command(name, pair, tmp_path / "out"), 5, *mentions)


def test_a_secret_outside_the_checkpoint_is_not_read(whole: Pair, tmp_path: Path) -> None:
    """The file exists and is valid: only the rule keeps it out."""
    pair = damaged(whole, "mllm", tmp_path, with_index(lambda m: m.update({Q: "../s.safetensors"})))
    write_shard(tmp_path / "s.safetensors", {Q: store(np.zeros((HIDDEN, HIDDEN)))})
    refused(command("linear", pair, tmp_path / "out"), 5, "../s.safetensors")


def empty(directory: Path) -> None:
    (directory / INDEX).unlink()
    (directory / OTHER).unlink()
    write_shard(directory / SHARD, {})


def replace_weights(name: str, data: bytes) -> Break:
    def damage(directory: Path) -> None:
        for file in (INDEX, SHARD, OTHER):
            (directory / file).unlink()
        if name:
            (directory / name).write_bytes(data)

    return damage


def config(text: str | bytes | None) -> Break:
    def damage(directory: Path) -> None:
        if text is None:
            (directory / "config.json").unlink()
        else:
            data = text if isinstance(text, bytes) else text.encode()
            (directory / "config.json").write_bytes(data)

    return damage


FILES: dict[str, tuple[Break, tuple[str, ...]]] = {
    "no config": (config(None), ("config.json",)),
    "an empty config": (config(""), ("config.json cannot be read",)),
    "half a config": (config('{"hidden_size": 16,'), ("config.json cannot be read",)),
    "a binary config": (config(b"\xff\xfe\x00"), ("config.json cannot be read",)),
    "a list for a config": (config("[]"), ("config.json is not a JSON object",)),
    "a deep config": (config("[" * 100_000), ("config.json cannot be read",)),
    "no tensors": (empty, ("is empty",)),
    "no weights": (replace_weights("", b""), ("holds no weights",)),
    "a plain pickle": (
        replace_weights("pytorch_model.bin", pickle.dumps({"a": 1})),
        ("pytorch_model.bin", "torch.load(sys.argv[1], weights_only=True, mmap=True)"),
    ),
    "llama.cpp's format": (
        replace_weights("model-Q4_K_M.gguf", b"GGUF"),
        ("model-Q4_K_M.gguf", "GGUF"),
    ),
}


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("fault", FILES)
def test_a_directory_that_is_no_checkpoint_is_refused(
    fault: str, role: str, whole: Pair, tmp_path: Path
) -> None:
    damage, mentions = FILES[fault]
    pair = damaged(whole, role, tmp_path, damage)
    for name in COMMANDS:
        refused(command(name, pair, tmp_path / "out"), 5, *mentions)


class Payload:
    """Unpickled, it would create a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pkl"])
@pytest.mark.parametrize("role", ROLES)
def test_code_in_a_pickle_is_never_executed(
    role: str, name: str, whole: Pair, tmp_path: Path
) -> None:
    witness = tmp_path / "executed"
    code = pickle.dumps(Payload(witness))
    pair = damaged(whole, role, tmp_path, replace_weights(name, code))
    for verb in COMMANDS:
        refused(command(verb, pair, tmp_path / "out"), 5, name, "a pickle can run code")
        file = pair._replace(**{role: getattr(pair, role) / name})
        refused(command(verb, file, tmp_path / "out"), 5, name, "a pickle can run code")
    assert not witness.exists()
    pickle.loads(code)
    assert witness.exists(), "the payload of this test is a dud"


def test_a_pickle_beside_safetensors_weights_is_neither_read_nor_copied(tmp_path: Path) -> None:
    witness = tmp_path / "executed"
    extra = {"pytorch_model.bin": pickle.dumps(Payload(witness)), "optimizer.pt": b"\x80\x04."}
    pair = make_pair(tmp_path, layers=1, mllm_sidecars=extra)
    assert run(*command("linear", pair, tmp_path / "out")).code == 0
    assert not witness.exists()
    assert not set(os.listdir(tmp_path / "out")) & set(extra)


def test_remote_code_is_copied_and_never_imported(tmp_path: Path) -> None:
    code = f"open({str(tmp_path / 'executed')!r}, 'w')\n".encode()
    settings = {"auto_map": {"AutoConfig": "remote.modeling_tiny.Config"}}
    pair = make_pair(
        tmp_path,
        layers=1,
        mllm_sidecars={"remote/modeling_tiny.py": code},
        mllm_config_changes=settings,
    )
    assert run(*command("linear", pair, tmp_path / "out")).code == 0
    assert (tmp_path / "out" / "remote" / "modeling_tiny.py").read_bytes() == code
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("name", COMMANDS)
def test_sources_that_are_not_there_exit_3(name: str, whole: Pair, tmp_path: Path) -> None:
    loop = tmp_path / "loop"
    loop.symlink_to("loop")
    dangling = tmp_path / "dangling"
    dangling.symlink_to("nowhere")
    for path in (tmp_path / "missing", loop, dangling):
        refused(command(name, whole._replace(mllm=path), tmp_path / "out"), 3, str(path))


@pytest.mark.parametrize("name", COMMANDS)
def test_a_directory_that_links_to_itself_inside_is_no_trap(name: str, tmp_path: Path) -> None:
    pair = make_pair(tmp_path, layers=1)
    (pair.mllm / "again").symlink_to(pair.mllm)
    (pair.mllm / "notes.txt").symlink_to("notes.txt")
    result = run(*command(name, pair, tmp_path / "out"))
    assert result.code == 0, result
    if name == "linear":
        assert "again" not in os.listdir(tmp_path / "out")


# Models that do not fit.


@pytest.mark.parametrize("name", COMMANDS)
def test_wrong_shapes_are_refused_with_both_shapes(name: str, tmp_path: Path) -> None:
    wider = store(np.ones((2 * INTERMEDIATE, HIDDEN)))
    gate = "model.layers.0.mlp.gate_proj.weight"
    pair = make_pair(tmp_path, layers=1, reasoner={gate: wider})
    shapes = (f"({2 * INTERMEDIATE}, {HIDDEN})", f"({INTERMEDIATE}, {HIDDEN})")
    result = run(*command(name, pair, tmp_path / "out"))
    assert result.code == 4
    assert "Traceback" not in result.stderr
    for mention in ("layers.0.mlp.gate_proj.weight", *shapes, "--on-mismatch skip"):
        assert mention in result.stderr


@pytest.mark.parametrize("name", ["compute", "linear"])
def test_an_unrelated_model_is_refused(name: str, tmp_path: Path) -> None:
    pair = make_pair(tmp_path, layers=1)
    other = tmp_path / "other"
    other.mkdir()
    tensors = {f"encoder.block{i}.conv.weight": store(np.ones((3, 3))) for i in range(4)}
    write_shard(other / "model.safetensors", tensors)
    (other / "config.json").write_text('{"model_type": "resnet"}')
    refused(command(name, pair._replace(reasoner=other), tmp_path / "out"), 4, "other")
    refused(command(name, pair._replace(mllm=other), tmp_path / "out"), 4, "other")


@pytest.mark.parametrize("name", ["compute", "linear"])
def test_swapped_arguments_are_refused_and_said_to_be_swapped(name: str, tmp_path: Path) -> None:
    pair = make_pair(tmp_path, layers=1)
    swapped = Pair(pair.mllm, pair.reasoner)
    refused(command(name, swapped, tmp_path / "out"), 4, "swapped")


# Values that are no numbers.


def poisoned(name: str, count: int, value: float, dtype: str = "BF16") -> dict[str, Stored]:
    values = np.ones((text_shapes(1) | {"visual.merger.mlp.2.weight": (HIDDEN, 32)})[name])
    values.reshape(-1)[:count] = value
    return {name: store(values, dtype)}


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32", "F64"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("name", ["compute", "linear"])
def test_nan_and_inf_are_named_and_counted(
    name: str, role: str, value: float, dtype: str, tmp_path: Path
) -> None:
    pair = make_pair(tmp_path, layers=1, **{role: poisoned(Q, 3, value, dtype)})  # type: ignore[arg-type]
    refused(command(name, pair, tmp_path / "out"), 5, f"{role}: {Q}: 3 values", "--allow-nonfinite")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_inf_in_a_copied_tensor_are_named_and_counted(value: float, tmp_path: Path) -> None:
    name = "visual.merger.mlp.2.weight"
    pair = make_pair(tmp_path, layers=1, mllm=poisoned(name, 2, value))
    refused(command("linear", pair, tmp_path / "out"), 5, f"mllm: {name}: 2 values")


def test_nan_where_it_is_not_read_is_no_concern_of_a_prior(tmp_path: Path) -> None:
    name = "visual.merger.mlp.2.weight"
    pair = make_pair(tmp_path, layers=1, mllm=poisoned(name, 2, float("nan")))
    assert run(*command("compute", pair, tmp_path / "out")).code == 0


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("name", ["compute", "linear"])
def test_nan_is_accepted_on_request_and_counted_in_the_manifest(
    name: str, role: str, tmp_path: Path
) -> None:
    poison: Any = {role: poisoned(Q, 3, float("nan")) | poisoned(K, 1, float("inf"))}
    pair = make_pair(tmp_path, layers=1, **poison)
    out = tmp_path / "out"
    result = run(*command(name, pair, out), "--allow-nonfinite")
    assert result.code == 0, result
    file = "prior.json" if name == "compute" else "drift_merge.json"
    tensors = json.loads((out / file).read_text())["tensors"]
    counted = {n: entry["nonfinite"] for n, entry in tensors.items() if "nonfinite" in entry}
    cut = "model." if name == "compute" else ""
    assert counted == {
        Q.removeprefix(cut): {f"{role}: {Q}": 3},
        K.removeprefix(cut): {f"{role}: {K}": 1},
    }
    written = read_tensors(out)[Q.removeprefix(cut)].values
    assert int(np.isnan(written).sum()) == 3
    assert run(command(name, pair, out)[0], "verify", str(out)).code == 0


def test_nan_in_a_copied_tensor_is_accepted_on_request_and_counted(tmp_path: Path) -> None:
    name = "visual.merger.mlp.2.weight"
    pair = make_pair(tmp_path, layers=1, mllm=poisoned(name, 2, float("nan")))
    out = tmp_path / "out"
    assert run(*command("linear", pair, out), "--allow-nonfinite").code == 0
    entry = json.loads((out / "drift_merge.json").read_text())["tensors"][name]
    assert entry["nonfinite"] == {f"mllm: {name}": 2}
    assert read_tensors(out)[name] == read_tensors(pair.mllm)[name]


@pytest.mark.parametrize(
    ("stored", "value", "dtype"),
    [
        ("F32", 1e5, "float16"),
        ("F32", 3.4e38, "bfloat16"),
        ("F64", 1e300, "float32"),
        ("F64", 1e300, "bfloat16"),
    ],
)
@pytest.mark.parametrize("name", ["compute", "linear"])
def test_a_value_that_the_output_dtype_cannot_hold_is_refused(
    name: str, stored: str, value: float, dtype: str, tmp_path: Path
) -> None:
    big: Any = {"reasoner": poisoned(Q, 3, value, stored), "mllm": poisoned(Q, 3, value, stored)}
    if name == "compute":
        big["mllm"] = poisoned(Q, 3, -value, stored) if value < 3e38 else poisoned(Q, 0, 0, stored)
    pair = make_pair(tmp_path, layers=1, **big)
    arguments = [*command(name, pair, tmp_path / "out"), "--dtype", dtype]
    refused(arguments, 5, "the result in", Q.removeprefix("model."), "3 values", "--dtype float32")


# Shapes and dtypes at the edge.


def test_empty_tensors_and_scalars_pass_through(tmp_path: Path) -> None:
    extra = {
        "visual.empty": store(np.zeros((0, 5))),
        "visual.scalar": store(np.float32(1.5)),
        "visual.flags": store(np.array([True, False]), "BOOL"),
        "visual.count": store(np.array(7), "I64"),
        "model.layers.0.mlp.gate_proj.bias": store(np.zeros((0,))),
        "model.layers.0.mlp.up_proj.bias": store(np.float32(0.25)),
    }
    tower = {name: tensor for name, tensor in extra.items() if name.startswith("model.")}
    pair = make_pair(tmp_path, layers=1, mllm=extra, reasoner=tower)
    for name in ("compute", "linear"):
        out = tmp_path / name
        result = run(*command(name, pair, out))
        assert result.code == 0, result
        assert run(command(name, pair, out)[0], "verify", str(out)).code == 0
    written = read_tensors(tmp_path / "linear")
    assert {name: written[name] for name in extra} == extra
    assert read_tensors(tmp_path / "compute")["layers.0.mlp.up_proj.bias"].values == 0


def test_data_at_odd_offsets_gives_the_same_result(tmp_path: Path) -> None:
    pair = make_pair(tmp_path / "even", layers=1)
    odd = make_pair(tmp_path / "odd", layers=1)
    for directory in odd:
        header, data = header_of(directory / "model.safetensors")
        text = json.dumps(header).encode()
        text += b" " * (1 - len(text) % 2)
        (directory / "model.safetensors").write_bytes(shard_bytes(text, data))
        assert (len(text) + 8) % 2 == 1
    for number, some in enumerate((pair, odd)):
        for name in ("compute", "linear"):
            assert run(*command(name, some, tmp_path / f"{name}{number}")).code == 0
    for name in ("compute", "linear"):
        assert read_tensors(tmp_path / f"{name}0") == read_tensors(tmp_path / f"{name}1")


# Quantized inputs: codes are no numbers.

CODES = Stored("U8", (HIDDEN, HIDDEN), bytes(HIDDEN * HIDDEN))
QUANTIZED: dict[str, tuple[dict[str, Stored | None], dict[str, Any], str]] = {
    "named by its config": ({}, {"quantization_config": {"quant_method": "gptq"}}, "gptq"),
    "named by its text config": (
        {},
        {"text_config": {"quantization_config": {"quant_method": "awq"}}},
        "awq",
    ),
    "int8 codes": ({Q: CODES._replace(dtype="I8")}, {}, Q),
    "uint8 codes": ({Q: CODES}, {}, Q),
    "float8": ({Q: CODES._replace(dtype="F8_E4M3")}, {}, Q),
    "scales beside a weight": (
        {Q.replace(".weight", ".weight_scale"): store(np.ones(HIDDEN))},
        {},
        "q_proj.weight_scale",
    ),
    "GPTQ names": (
        {
            Q: None,
            Q.replace(".weight", ".qweight"): Stored("I32", (2, HIDDEN), bytes(8 * HIDDEN)),
            Q.replace(".weight", ".scales"): store(np.ones((1, HIDDEN)), "F16"),
        },
        {},
        "q_proj.qweight",
    ),
    "bitsandbytes shapes": (
        {
            Q: Stored("U8", (HIDDEN * HIDDEN // 2, 1), bytes(HIDDEN * HIDDEN // 2)),
            f"{Q}.absmax": store(np.ones(4), "F32"),
        },
        {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
        "bitsandbytes",
    ),
}


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("form", QUANTIZED)
@pytest.mark.parametrize("name", ["compute", "linear"])
def test_a_quantized_input_is_refused_by_name(
    name: str, form: str, role: str, tmp_path: Path
) -> None:
    tensors, settings, mention = QUANTIZED[form]
    key = "reasoner_config" if role == "reasoner" else "mllm_config_changes"
    changes: Any = {role: tensors, key: settings}
    pair = make_pair(tmp_path, layers=1, **changes)
    given = str(getattr(pair, role))
    refused(command(name, pair, tmp_path / "out"), 5, f"{given} is quantized", mention)


# Files that change under us.


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("name", ["compute", "linear"])
@pytest.mark.parametrize("change", ["shrunk", "grown", "gone"])
def test_a_shard_that_changes_after_it_was_opened_is_named(
    change: str, name: str, role: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from drift_merge.engine import job

    pair = make_pair(tmp_path, layers=1)
    shard: Path = getattr(pair, role) / "model.safetensors"
    check_plan = job.check_plan

    def check_and_change(*args: Any, **keywords: Any) -> None:
        check_plan(*args, **keywords)
        if change == "gone":
            shard.unlink()
        else:
            os.truncate(shard, shard.stat().st_size + (-64 if change == "shrunk" else 64))

    monkeypatch.setattr(job, "check_plan", check_and_change)  # the plan is made, no data is read
    result = run(*command(name, pair, tmp_path / "out"))
    assert_refusal(result, 5, ["model.safetensors"])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["compute", "linear"])
def test_a_shard_that_shrinks_while_it_is_read_does_not_kill_the_process(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from drift_merge.storage.mapped import MappedCheckpoint

    pair = make_pair(tmp_path, layers=1)
    release = MappedCheckpoint.release

    def release_and_shrink(self: MappedCheckpoint, *args: Any) -> None:
        release(self, *args)
        os.truncate(pair.mllm / "model.safetensors", 10)

    monkeypatch.setattr(MappedCheckpoint, "release", release_and_shrink)  # after one tensor
    result = run(*command(name, pair, tmp_path / "out"))
    assert_refusal(result, 5, ["model.safetensors changed while it was being used"])
    assert not (tmp_path / "out").exists()


def test_terminal_codes_in_a_name_do_not_reach_the_terminal(tmp_path: Path) -> None:
    pair = make_pair(tmp_path, layers=1)
    header, data = header_of(pair.mllm / "model.safetensors")
    entry = header.pop(tensor_of(header))
    header = {"\x1b[2Jgone": entry | {"dtype": "EVIL"}} | header
    (pair.mllm / "model.safetensors").write_bytes(shard_bytes(header, data))
    result = run(*command("align", pair, tmp_path / "out"))
    assert_refusal(result, 5, [r"\x1b[2Jgone"])
    assert "\x1b" not in result.stderr
