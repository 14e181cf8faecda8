"""What the injection owns does not grow with the model: measured in a process of its own."""

import sys

import pytest

from tests.engine.memory import run, write_sparse

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")

ROWS, COLS = 24_000, 1024  # 49 MB in bfloat16, 98 MB in float32

APPLY = """
import json, sys, threading
from pathlib import Path
import torch
import drift_merge
from tests.runs import run_prior
from tests.training.toys import holder
torch.set_num_threads(2)
reasoner, mllm, out, rule = sys.argv[1:]
prior = run_prior(Path(reasoner), Path(mllm), Path(out)).prior
at = "model.language_model."
tensors = {at + name: torch.zeros(entry["shape"]) for name, entry in prior.tensors.items()}
model = holder(tensors | {at + "embed_tokens.weight": torch.zeros(8, 1024)})
for parameter in model.parameters():
    parameter.grad = torch.ones_like(parameter)
peak, done = 0, threading.Event()
def watch():
    global peak
    while not done.wait(0.001):
        peak = max(peak, status("RssAnon"))
before = status("RssAnon")
watcher = threading.Thread(target=watch)
watcher.start()
handle = drift_merge.attach(model, prior, rule=rule)
handle.apply()
handle.report()
handle.refresh()
for parameter in model.parameters():
    parameter.grad.zero_()
handle.apply()
done.set()
watcher.join()
print(json.dumps(peak - before))
"""


@pytest.mark.parametrize("rule", ["adaptive_cosine", "absolute"])
def test_attach_apply_report_and_refresh_need_a_few_chunks_only(tmp_path, rule):
    layer = {
        "self_attn.q_proj.weight": [16, COLS],
        "mlp.gate_proj.weight": [ROWS, COLS],
        "mlp.up_proj.weight": [ROWS, COLS],
    }
    shapes = {"model.embed_tokens.weight": [8, COLS]}
    shapes |= {f"model.layers.{i}.{n}": s for i in range(2) for n, s in layer.items()}
    write_sparse(tmp_path / "reasoner", shapes, {}, 2)
    write_sparse(tmp_path / "mllm", shapes | {"visual.x": [8, 8]}, {}, 2)
    grown = run(APPLY, tmp_path / "reasoner", tmp_path / "mllm", tmp_path / "out", rule)
    largest = 4 * ROWS * COLS
    assert grown < 80e6 < 2 * largest + 100e6
