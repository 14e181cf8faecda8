"""Inputs that shrink, are replaced or are written to while a command reads them: all refused.

The strike comes at a read of data, so that the headers before it were sound.
"""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from drift_merge.storage.mapped import MappedCheckpoint
from tests.checkpoints import Pair, make_pair, random_tensors, text_shapes, tokenizer
from tests.faults.harness import assert_refusal, run

SHARD = "model.safetensors"


def shrink(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 3)


def replace(path: Path) -> None:
    """Another file of the same size and time: only its number tells."""
    status = path.stat()
    copy = path.with_name("copy")
    copy.write_bytes(path.read_bytes()[:-2] + b"\0\0")
    os.utime(copy, ns=(status.st_atime_ns, status.st_mtime_ns))
    copy.rename(path)


def write(path: Path) -> None:
    with open(path, "r+b") as file:
        file.seek(-2, os.SEEK_END)
        file.write(b"\1\1")
    os.utime(path, ns=(0, 10**9))  # where the clock of the disk is coarse


CHANGES = {"shrinks": shrink, "is replaced": replace, "is written to": write}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pair whose vocabularies differ, and what commands that check or go on need."""
    folder = tmp_path_factory.mktemp("whole")
    words = [f"w{number}" for number in range(32)]
    turned = random_tensors(text_shapes(1), 7)
    pair = make_pair(
        folder,
        layers=1,
        reasoner={"model.embed_tokens.weight": turned["model.embed_tokens.weight"]},
        reasoner_sidecars={"tokenizer.json": tokenizer(words[::-1])},
        mllm_sidecars={"tokenizer.json": tokenizer(words)},
    )
    assert run("drift-prior", "compute", *pair.arguments, "-o", f"{folder}/prior").code == 0
    assert run("drift-merge", "ties", *merge_words(pair), "-o", f"{folder}/merged").code == 0
    recipe = f"method: linear\nreasoner: {pair.reasoner}\nmllm: {pair.mllm}\n"
    (folder / "recipe.yaml").write_text(recipe)
    return folder


def merge_words(pair: Pair) -> list[str]:
    return [*pair.arguments, "--base", str(pair.reasoner), "--threads", "1"]


COMMANDS: dict[str, Callable[[Path, Pair, Path], list[str]]] = {
    "compute": lambda _, pair, out: ["drift-prior", "compute", *pair.arguments, "-o", str(out)],
    "linear": lambda _, pair, out: [
        *("drift-merge", "linear", *pair.arguments, "-o", str(out), "--threads", "1"),
        *("--modules", "attn,mlp,embed"),
    ],
    "ties": lambda _, pair, out: [
        *("drift-merge", "ties", *merge_words(pair), "--trim", "global", "-o", str(out))
    ],
    "spectral": lambda _, pair, out: ["drift-merge", "tsv-m", *merge_words(pair), "-o", str(out)],
    "compare": lambda _, pair, __: ["drift-merge", "compare", *pair.arguments],
    "verify": lambda folder, pair, _: [
        *("drift-merge", "verify", f"{folder}/merged", "--reasoner", str(pair.reasoner)),
        *("--mllm", str(pair.mllm), "--base", str(pair.reasoner)),
    ],
    "sweep": lambda folder, _, out: [
        *("drift-merge", "sweep", f"{folder}/recipe.yaml", "--set", "weight=0.1:0.2:0.1"),
        *("-o", str(out)),
    ],
}


@pytest.mark.parametrize("at", [9, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", COMMANDS)
def test_an_input_that_changes_while_it_is_read_is_refused_by_name(
    name: str, change: str, at: int, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    victim = whole / "reasoner" / SHARD
    shutil.copy2(victim, tmp_path / SHARD)
    real, calls = MappedCheckpoint.read, [0]

    def read(self: MappedCheckpoint, *args: object) -> None:
        calls[0] += 1
        if calls[0] == at:
            CHANGES[change](victim)
        real(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(MappedCheckpoint, "read", read)
    pair = Pair(whole / "reasoner", whole / "mllm")
    try:
        result = run(*COMMANDS[name](whole, pair, out))
    finally:
        shutil.move(tmp_path / SHARD, victim)
    assert calls[0] >= at
    assert_refusal(result, 5, [SHARD])
    assert not out.exists() or not list(out.rglob("*.safetensors"))
