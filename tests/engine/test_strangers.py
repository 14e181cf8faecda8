"""Pairs that a map made: what the values show to be no pair is refused, what they show is taken."""

from pathlib import Path

import numpy as np
import pytest

import drift_merge
from drift_merge.errors import AlignmentError
from drift_merge.storage.hub import ranges
from tests import checkpoints as c
from tests.hub_server.client import impatient
from tests.hub_server.models import MLLM, REASONER

MAP = """\
mllm:
  "model.layers.{layer}.mlp.ff.weight": "layers.{layer}.mlp.FUSED.weight"
  "model.layers.{layer}.self_attn.query.weight": "layers.{layer}.self_attn.q_proj.weight"
"""


def related(names, seed, noise):
    """The same values for the same name, and a little of their own."""
    found = {}
    for name, shape in names.items():
        common = np.random.default_rng(list(name.encode())).standard_normal(shape)
        own = np.random.default_rng([seed, *name.encode()]).standard_normal(shape)
        found[name] = common + noise * own
    return found


def write(folder: Path, *, up_first: bool, permuted: bool = False) -> None:
    names = c.text_shapes(layers=4)
    text, other = related(names, 1, 0.1), related(names, 2, 0.1)
    mllm = {}
    for name, values in other.items():
        if name.endswith("mlp.gate_proj.weight"):
            halves = [values, other[name.replace("gate_proj", "up_proj")]]
            fused = np.concatenate(halves[::-1] if up_first else halves)
            mllm[name.replace("gate_proj", "ff")] = fused
        elif name.endswith("self_attn.q_proj.weight"):
            rows = np.random.default_rng(3).permutation(len(values)) if permuted else slice(None)
            mllm[name.replace("q_proj", "query")] = values[rows]
        elif "mlp.up_proj" not in name:
            mllm[name] = values
    mllm["visual.patch_embed.proj.weight"] = np.ones((4, 4))
    for side, tensors in (("reasoner", text), ("mllm", mllm)):
        stored = {name: c.store(values, "F32") for name, values in tensors.items()}
        c.write_checkpoint(folder / side, stored, c.text_config(4))


def merge(folder: Path, fused: str, pair=None, **options) -> Path:
    (folder / "map.yaml").write_text(MAP.replace("FUSED", fused))
    out = folder / f"merged-{fused}{'-streamed' * bool(pair)}"
    reasoner, mllm = pair or (folder / "reasoner", folder / "mllm")
    drift_merge.linear(
        [reasoner],
        mllm,
        out,
        weights=[1.0],
        map_file=folder / "map.yaml",
        progress=False,
        **options,
    )
    return out


@pytest.mark.parametrize("up_first", [True, False])
def test_halves_are_taken_in_the_order_that_the_map_says(tmp_path, up_first):
    write(tmp_path, up_first=up_first)
    right, wrong = ("up_gate_proj", "gate_up_proj")[:: 1 if up_first else -1]
    out = merge(tmp_path, right)
    shard = c.read_shard(out / "model.safetensors")
    text = c.read_shard(tmp_path / "reasoner" / "model.safetensors")
    halves = [text[f"model.layers.1.mlp.{p}_proj.weight"].values for p in ("gate", "up")]
    expected = np.concatenate(halves[::-1] if up_first else halves)
    np.testing.assert_array_equal(shard["model.layers.1.mlp.ff.weight"].values, expected)
    with pytest.raises(AlignmentError, match="not the same matrix") as caught:
        merge(tmp_path, wrong)
    assert "mlp.up_gate_proj" in caught.value.remedy
    assert not (tmp_path / f"merged-{wrong}").exists()


def test_models_on_the_hub_are_looked_at_by_a_few_of_their_rows(tmp_path, monkeypatch):
    write(tmp_path, up_first=True)
    local = merge(tmp_path, "up_gate_proj")
    monkeypatch.setattr(ranges, "GAP_BYTES", 0)
    with impatient(tmp_path / "home", monkeypatch) as hub:
        for name in (REASONER, MLLM):
            hub.add_commit(name, tmp_path / name.partition("/")[2])
        asked = (REASONER, MLLM)
        with pytest.raises(AlignmentError, match="not the same matrix"):
            merge(tmp_path, "gate_up_proj", asked, stream=True)
        sent = [x for x in hub.requests("GET /lfs/") if not x.range]
        assert not sent  # no shard was fetched whole to find that out
        out = merge(tmp_path, "up_gate_proj", asked, stream=True)
    assert c.read_tensors(out) == c.read_tensors(local)


def test_rows_in_another_order_are_refused_by_a_prior_too(tmp_path):
    write(tmp_path, up_first=False, permuted=True)
    (tmp_path / "map.yaml").write_text(MAP.replace("FUSED", "gate_up_proj"))
    with pytest.raises(AlignmentError, match=r"q_proj\.weight and what it is paired with"):
        drift_merge.compute(
            tmp_path / "reasoner",
            tmp_path / "mllm",
            tmp_path / "prior",
            map_file=tmp_path / "map.yaml",
            progress=False,
        )
