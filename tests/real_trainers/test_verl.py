"""verl's FSDP2 engine on two ranks; skipped where it is not installed.

It pins other versions than .ci/engines: run it in an environment of its own.
"""

import importlib.util

import pytest
import torch

from tests import tiny_models
from tests.real_engines.launch import launch
from tests.real_trainers import tiny

pytestmark = [
    pytest.mark.engines,
    pytest.mark.filterwarnings("default"),
    pytest.mark.skipif(importlib.util.find_spec("verl") is None, reason="needs verl"),
]


def test_an_external_module_hooks_the_engines_optimizer_and_its_checkpoints(tmp_path):
    setup = tiny.make_setup("qwen2_5_vl", tmp_path)
    # verl's patch of Qwen2.5-VL needs images in every batch: the tower alone, as a text model.
    text, live = tiny_models.qwen2(tiny.TEXT), dict(setup.model().named_parameters())
    with torch.no_grad():
        for name, parameter in text.named_parameters():
            tower = name.replace("model.", setup.family.tower, 1)
            parameter.copy_(live[name if name.startswith("lm_head") else tower])
    text.save_pretrained(tmp_path / "text")
    tiny.tokenizer().save_pretrained(tmp_path / "text")
    results = launch(
        "tests.real_trainers.scenarios.verl_engine",
        tmp_path / "run",
        source=str(tmp_path),
        text=str(tmp_path / "text"),
    )
    for found in results:
        assert "drift_merge.json" in found["files"]
        assert found["metrics"]["drift/alpha"] == 0.5  # the third of four steps
        assert found["metrics"]["drift/bias_ratio"] > 0
        assert found["resumed"] == pytest.approx(found["metrics"], rel=1e-5)
        for name, weights in found["whole"].items():
            assert torch.equal(weights, found["again"][name]), name
