"""The folder of an mllm through the real command line: nothing lost, nothing stale carried."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoints import Pair, make_pair, read_files, read_tensors
from tests.faults.forks import CHANGES, Forks
from tests.faults.harness import assert_refusal, command, refused, run
from tests.faults.inputs.folders import LEFT, OTHERS
from tests.faults.inputs.runs import ROOT, manifest, succeed


@pytest.mark.parametrize("num_shards", [1, 2])
def test_weights_of_others_are_carried_and_copies_and_training_left_out_and_named(
    num_shards: int, tmp_path: Path
) -> None:
    pair = make_pair(tmp_path, layers=1, num_shards=num_shards, mllm_sidecars=OTHERS | LEFT)
    plain = make_pair(tmp_path / "plain", layers=1, num_shards=num_shards)
    out = tmp_path / "out"
    said = succeed(pair, out, "--max-shard-size", "2KB")
    succeed(plain, tmp_path / "expected", "--max-shard-size", "2KB")
    ours, without = read_files(out), read_files(tmp_path / "expected")
    assert {name: ours[name] for name in OTHERS} == OTHERS
    assert set(ours) == set(without) | set(OTHERS)
    same = set(without) - {"drift_merge.json", "README.md"}
    assert {name: ours[name] for name in same} == {name: without[name] for name in same}
    size = sum(map(len, LEFT.values()))
    assert f"[left_out]: Left out of the mllm's folder (8 files, {size} bytes)" in said
    assert "a second copy of the weights: consolidated.safetensors, model-00007" in said
    assert "a state of training: checkpoint-500/, optimizer.pt, wandb/." in said
    assert "[carried]: Weights of others are carried over as they are" in said
    found = manifest(out)
    assert found["left_out"]["checkpoint-500/"] == {
        "reason": "a state of training",
        "files": 2,
        "bytes": 5,
    }
    assert sum(entry["files"] for entry in found["left_out"].values()) == len(LEFT)
    assert set(OTHERS) < set(found["sidecars"])
    # As an input it is the same model again: nothing beside the index is mistaken for a shard.
    again = tmp_path / "again"
    succeed(Pair(pair.reasoner, out), again)
    assert manifest(again)["tensors"].keys() == read_tensors(plain.mllm).keys()


@pytest.mark.parametrize("damage", ["change", "remove"])
def test_verify_sees_to_every_carried_file(damage: str, tmp_path: Path) -> None:
    pair = make_pair(tmp_path, layers=1, mllm_sidecars=OTHERS)
    out = tmp_path / "out"
    succeed(pair, out)
    assert run("drift-merge", "verify", str(out)).code == 0
    path = out / "speech-lora/adapter_model.safetensors"
    if damage == "change":
        path.write_bytes(path.read_bytes()[:-1] + b"x")
    else:
        path.unlink()
    result = run("drift-merge", "verify", str(out))
    assert_refusal(result, 1, ["speech-lora/adapter_model.safetensors"])


def test_space_for_carried_files_is_asked_for_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = make_pair(tmp_path, layers=1)
    with open(pair.mllm / "big.nemo", "wb") as file:
        file.truncate(2**40)  # a hole
    written: list[Any] = []
    monkeypatch.setattr(os, "pwrite", lambda *args: written.append(args))
    real = os.statvfs(tmp_path)
    free = os.statvfs_result([4096, 4096, *real[2:4], 2**27, *real[5:]])  # 512 GiB
    monkeypatch.setattr(os, "statvfs", lambda _: free)
    refused(command("linear", pair, tmp_path / "out"), 6, "too small", "1,099,5", "Free some")
    assert not written


def test_a_prior_takes_no_notice_of_files_that_it_does_not_carry(tmp_path: Path) -> None:
    pair = make_pair(tmp_path, layers=1, mllm_sidecars=OTHERS | LEFT)
    (pair.mllm / "private").symlink_to(tmp_path)
    result = run(*command("compute", pair, tmp_path / "out"))
    assert result.code == 0, result
    assert "left_out" not in result.stderr
    assert sorted(read_files(tmp_path / "out")) == [
        "README.md",
        "prior-00001-of-00001.safetensors",
        "prior.json",
        "prior.safetensors.index.json",
    ]
    refused(command("linear", pair, tmp_path / "merge"), 5, "private is a link to")


@pytest.mark.parametrize(
    "do", ["kill", *(pytest.param(n, marks=pytest.mark.slow) for n in (28, 5))]
)
def test_a_copy_that_is_cut_anywhere_leaves_out_absent_and_is_finished_by_a_rerun(
    do: str | int, forks: Forks, tmp_path: Path
) -> None:
    pair = make_pair(tmp_path / "pair", layers=1, mllm_sidecars=OTHERS)
    arguments = command("linear", pair, tmp_path / "whole")
    calls = forks.run(*arguments, count=CHANGES).calls
    whole = read_files(tmp_path / "whole")
    first = len(calls) - 1 - calls[::-1].index("pwrite")  # of the weights; then come the copies
    numbers = range(first + 1, len(calls) + 1, 5)
    outs = [tmp_path / f"out{number}" for number in numbers]
    runs = [
        {"arguments": command("linear", pair, out), "count": CHANGES, "at": number, "do": do}
        for number, out in zip(numbers, outs, strict=True)
    ]
    cut = 0
    for begin in range(0, len(runs), 8):
        some = runs[begin : begin + 8]
        for request, result in zip(some, forks.run_all(some), strict=True):
            out = Path(request["arguments"][5])
            cut += result.code != 0
            assert not out.exists() or read_files(out) == whole
            if result.code == 6:
                assert_refusal(result, 6, ["cannot be"])
            if not out.exists():
                again = forks.run(*request["arguments"])
                assert again.code == 0, again
            assert read_files(out) == whole
    assert cut == len(runs) >= 10


GROWTH = """
import json, sys
from pathlib import Path
from tests.runs import run_linear
reasoner, mllm, out = map(Path, sys.argv[1:])
run_linear(reasoner, mllm, Path(f"{out}-warm"), 0.3)  # pays for what is loaded once
with open(mllm / "big.nemo", "wb") as file:
    file.truncate(300_000_000)
def peak():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmHWM")) * 1024
before = peak()
run_linear(reasoner, mllm, out, 0.3)
print(json.dumps([peak() - before, (out / "big.nemo").stat().st_size]))
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_large_file_is_carried_in_little_memory(tmp_path: Path) -> None:
    pair = make_pair(tmp_path, layers=1)
    done = subprocess.run(
        [sys.executable, "-c", GROWTH, *pair.arguments, str(tmp_path / "out")],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    growth, size = json.loads(done.stdout)
    assert size == 300_000_000
    assert growth < 50_000_000
