"""Merges that succeed, and what they say."""

import json
from pathlib import Path
from typing import Any

from tests.checkpoints import Pair
from tests.faults.harness import command, run

ROOT = Path(__file__).parents[3]


Q = "model.layers.0.self_attn.q_proj.weight"


def manifest(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "drift_merge.json").read_text())
    return found


def succeed(pair: Pair, out: Path, *options: str) -> str:
    result = run(*command("linear", pair, out), *options)
    assert result.code == 0, result
    return result.stderr
