"""Models that do not fit each other, and files that change while they are read."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.checkpoints import (
    HIDDEN,
    INTERMEDIATE,
    Pair,
    make_pair,
    store,
    write_shard,
)
from tests.faults.harness import assert_refusal, command, refused, run
from tests.faults.inputs.damage import (
    COMMANDS,
    ROLES,
)

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
