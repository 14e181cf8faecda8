"""Trainers over two processes: equal to the hand-written update of one."""

import pytest

pytest.importorskip("transformers")

from tests.engines.launch import launch
from tests.trainers import tiny

pytestmark = [
    pytest.mark.engines,
    pytest.mark.filterwarnings("default"),
    pytest.mark.timeout(600),
]
RATE = 0.5


@pytest.fixture(scope="module")
def setup(tmp_path_factory):
    return tiny.make_setup("llava", tmp_path_factory.mktemp("llava"))


@pytest.mark.parametrize("stage", [2, 3])
def test_trainer_under_deepspeed_equals_the_hand_written_update(setup, tmp_path, stage):
    pytest.importorskip("deepspeed")
    results = launch(
        "tests.trainers.scenarios.trainer_zero",
        tmp_path / "run",
        source=str(setup.mllm.parent),
        stage=stage,
    )
    model, samples = setup.model(), setup.samples(8)
    batches = [setup.collate(samples[at : at + 2]) for at in range(0, 8, 2)]
    plain = tiny.gradients_of(model, batches)
    expected = tiny.sgd(model, tiny.biased(plain, setup.deltas), RATE)
    for found in results:
        for name, weights in found["weights"].items():
            difference = (weights.double() - expected[name]).abs().max().item()
            assert difference <= 2e-5 * RATE, (name, difference)
        # accelerate's backward also steps under DeepSpeed: the event comes after the update.
        assert found["order"] == ["bias", "on_pre_optimizer_step"]
        assert "drift/cosine" in found["log"]
