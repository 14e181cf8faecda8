"""Memory does not depend on the model: measured in processes of their own, on sparse files."""

import sys

import numpy as np
import pytest

from tests import checkpoints as c
from tests.engine.memory import run, write_sparse

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")


def mixture(layers, experts, *, hidden=4096, width=1536):
    """Names and shapes of a large mixture of experts: 700B parameters at 60 x 277."""
    shapes = {"model.embed_tokens.weight": [100_000, hidden], "model.norm.weight": [hidden]}
    for layer in range(layers):
        at = f"model.layers.{layer}."
        for name in ("q", "k", "v", "o"):
            shapes[f"{at}self_attn.{name}_proj.weight"] = [hidden, hidden]
        shapes[f"{at}mlp.gate.weight"] = [experts, hidden]
        shapes[f"{at}input_layernorm.weight"] = [hidden]
        for expert in range(experts):
            shapes[f"{at}mlp.experts.{expert}.gate_proj.weight"] = [width, hidden]
            shapes[f"{at}mlp.experts.{expert}.up_proj.weight"] = [width, hidden]
            shapes[f"{at}mlp.experts.{expert}.down_proj.weight"] = [hidden, width]
    return shapes


DRY_RUN = """
import contextlib, io, json, sys, time
from drift_merge.cli.merge import group
started = time.process_time()
out = io.StringIO()
with contextlib.redirect_stdout(out):
    group.main(["linear", *sys.argv[1:], "-n", "--json"], "drift-merge", standalone_mode=False)
plan = json.loads(out.getvalue())
assert "torch" not in sys.modules
seconds = time.process_time() - started
print(json.dumps([status("VmHWM"), seconds, plan["tensors"], plan["write_bytes"]]))
"""


@pytest.mark.parametrize(
    ("layers", "limit_bytes", "limit_seconds"),
    [(12, 150e6, 5), pytest.param(60, 500e6, 20, marks=pytest.mark.slow)],
)
def test_a_plan_needs_10_kb_and_half_a_millisecond_for_a_tensor(
    layers, limit_bytes, limit_seconds, tmp_path
):
    """60 layers are 50,000 tensors in 160 shards; 10 seconds on an idle machine."""
    shapes, num_shards = mixture(layers, 277), layers * 8 // 3
    vision = {f"visual.blocks.{i}.attn.qkv.weight": [3000, 1000] for i in range(30)}
    config = {"num_hidden_layers": layers}
    write_sparse(tmp_path / "reasoner", shapes, config, num_shards)
    config |= {"vision_config": {"depth": 30}}
    write_sparse(tmp_path / "mllm", shapes | vision, config, num_shards)
    arguments = (tmp_path / "reasoner", tmp_path / "mllm", "-o", tmp_path / "out")
    peak, seconds, tensors, size = run(DRY_RUN, *arguments)
    assert sum(tensors.values()) == len(shapes) + len(vision) > 833 * layers
    assert size > layers * 10e9
    assert peak < limit_bytes
    assert seconds < limit_seconds
    assert not (tmp_path / "out").exists()


STREAM = """
import json, sys, threading
from pathlib import Path
import torch
from tests.runs import run_compress, run_linear, run_prior
reasoner, mllm, out = map(Path, sys.argv[1:])
small = Path(str(out) + "-warm")
# The first run pays for what is loaded once; it is not what grows with a tensor.
run_prior(reasoner, mllm, small, modules="re:q_proj")
peak, done = 0, threading.Event()
def watch():
    global peak
    while not done.wait(0.002):
        peak = max(peak, status("RssAnon"))
before = status("RssAnon")
watcher = threading.Thread(target=watch, daemon=True)
watcher.start()
run_prior(reasoner, mllm, out / "prior", threads=2)
run_prior(reasoner, mllm, out / "float8", threads=2, dtype="float8_e4m3fn")
run_compress(out / "prior", out / "int8", threads=2)
run_linear(reasoner, mllm, out / "merge", 0.3, threads=2)
done.set()
watcher.join()
print(json.dumps(peak - before))
"""


def test_streaming_a_tensor_of_60_mb_needs_memory_for_a_few_chunks_only(tmp_path):
    rows, cols = 15_000, 1024
    tails = {"self_attn.q_proj.weight": [16, cols]}
    split = {"mlp.gate_proj.weight": [rows, cols], "mlp.up_proj.weight": [rows, cols]}
    fused = {"mlp.gate_up_proj.weight": [2 * rows, cols]}  # 61 MB
    down = {"mlp.down_proj.weight": [cols, rows]}  # 31 MB
    embed = {"model.embed_tokens.weight": [8, cols]}

    def shapes(*some):
        return embed | {f"model.layers.0.{n}": s for part in some for n, s in part.items()}

    write_sparse(tmp_path / "reasoner", shapes(tails, split, down), {}, 2)
    write_sparse(tmp_path / "mllm", shapes(tails, fused, down) | {"visual.x": [8, 8]}, {}, 2)
    grown = run(STREAM, tmp_path / "reasoner", tmp_path / "mllm", tmp_path / "out")
    assert grown < 40e6
    stored = c.read_tensors(tmp_path / "out/merge")["model.layers.0.mlp.gate_up_proj.weight"]
    assert not np.frombuffer(stored.data, np.uint16).any()
