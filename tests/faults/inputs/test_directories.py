"""Indexes, configs, pickles and links of broken or hostile checkpoint directories."""

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.checkpoints import (
    HIDDEN,
    Pair,
    make_pair,
    read_shard,
    store,
    write_index,
    write_shard,
)
from tests.faults.harness import command, refused, run
from tests.faults.inputs.damage import (
    COMMANDS,
    INDEX,
    OTHER,
    ROLES,
    SHARD,
    Break,
    Q,
    damaged,
)


def with_index(change: Callable[[dict[str, Any]], Any]) -> Break:
    def damage(directory: Path) -> None:
        weight_map = json.loads((directory / INDEX).read_text())["weight_map"]
        change(weight_map)
        write_index(directory, weight_map)

    return damage


def second_copy(directory: Path) -> None:
    """The tensors of one shard once more in the other, as a botched conversion leaves them."""
    first, second = directory / SHARD, directory / OTHER
    write_shard(second, read_shard(second) | read_shard(first))


def both(directory: Path) -> None:
    write_shard(directory / "model.safetensors", read_shard(directory / SHARD))


INDEXES: dict[str, tuple[Break, tuple[str, ...]]] = {
    "a missing shard": (lambda d: (d / OTHER).unlink(), (INDEX, "missing shard", OTHER)),
    "a file in the parent": (
        with_index(lambda m: m.update({Q: "../secret.safetensors"})),
        (INDEX, "'../secret.safetensors'", "not a plain path below its own directory"),
    ),
    "an absolute path": (
        with_index(lambda m: m.update({Q: "/elsewhere/secret.safetensors"})),
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


def test_a_secret_outside_the_checkpoint_is_not_read(whole: Pair, tmp_path: Path) -> None:
    """The file exists and is valid: only the rule keeps it out."""
    pair = damaged(whole, "mllm", tmp_path, with_index(lambda m: m.update({Q: "../s.safetensors"})))
    write_shard(tmp_path / "s.safetensors", {Q: store(np.zeros((HIDDEN, HIDDEN)))})
    refused(command("linear", pair, tmp_path / "out"), 5, "../s.safetensors")


def empty(directory: Path) -> None:
    (directory / INDEX).unlink()
    write_shard(directory / OTHER, {})
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


FAULTS = INDEXES | FILES


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_broken_index_or_a_directory_that_is_no_checkpoint_is_refused_by_name(
    fault: str, role: str, whole: Pair, tmp_path: Path
) -> None:
    damage, mentions = FAULTS[fault]
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
