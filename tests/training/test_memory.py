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
torch.optim.SGD([torch.nn.Parameter(torch.ones(1))])  # imports what every optimizer does
reasoner, mllm, out = sys.argv[1:]
prior = run_prior(Path(reasoner), Path(mllm), Path(out)).prior
at = "model.language_model."
tensors = {at + name: torch.zeros(entry["shape"]) for name, entry in prior.tensors.items()}
model = holder(tensors | {at + "embed_tokens.weight": torch.zeros(8, 1024)})
def watch():
    global peak
    while not done.wait(0.001):
        peak = max(peak, status("RssAnon"))
grown = {}
for rule in ("adaptive_cosine", "absolute"):
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    peak, done = 0, threading.Event()
    before = status("RssAnon")
    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    handle = drift_merge.attach(model, prior, rule=rule)
    handle.apply()
    handle.report()
    handle.refresh()
    for parameter in model.parameters():
        parameter.grad.zero_()
    handle.apply()
    handle.remove()
    done.set()
    watcher.join()
    grown[rule] = peak - before
print(json.dumps(grown))
"""


@pytest.mark.slow
def test_attach_apply_report_and_refresh_need_a_few_chunks_only(tmp_path):
    layer = {
        "self_attn.q_proj.weight": [16, COLS],
        "mlp.up_proj.weight": [ROWS, COLS],
    }
    shapes = {"model.embed_tokens.weight": [8, COLS]}
    shapes |= {f"model.layers.{i}.{n}": s for i in range(2) for n, s in layer.items()}
    write_sparse(tmp_path / "reasoner", shapes, {}, 2)
    write_sparse(tmp_path / "mllm", shapes | {"visual.x": [8, 8]}, {}, 2)
    grown = run(APPLY, tmp_path / "reasoner", tmp_path / "mllm", tmp_path / "out")
    assert max(grown.values()) < 80e6 < 4 * ROWS * COLS  # not even one tensor
