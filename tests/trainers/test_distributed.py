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


@pytest.mark.parametrize("rule", ["adaptive_cosine", "absolute"])
@pytest.mark.parametrize(
    ("engine", "use_dora"),
    [("ddp", False), ("fsdp", False), ("fsdp", True), ("zero2", False), ("zero3", False)],
)
def test_lora_over_two_ranks_equals_the_update_of_one(setup, tmp_path, engine, use_dora, rule):
    pytest.importorskip("peft")
    if engine.startswith("zero"):
        pytest.importorskip("deepspeed")
    model, samples = tiny.with_lora(setup, use_dora=use_dora), setup.samples(4)
    batches = [setup.collate(samples[:2]), setup.collate(samples[2:])]
    plain = tiny.gradients_of(model, batches)
    gradients = tiny.biased_factors(model, plain, setup, rule)
    expected = tiny.sgd(model, gradients, RATE)
    results = launch(
        "tests.trainers.scenarios.lora",
        tmp_path / "run",
        source=str(setup.mllm.parent),
        engine=engine,
        rule=rule,
        use_dora=use_dora,
    )
    for found in results:
        moved = set()
        for name, weights in found["weights"].items():
            ours = name.removeprefix("module.")
            difference = (weights.double() - expected[ours]).abs().max().item()
            assert difference <= 2e-5 * RATE, (name, difference)
            moved.add(ours)
        assert moved >= gradients.keys()
        assert found["metrics"]["drift/bias_ratio"] > 0
    assert results[0]["metrics"] == pytest.approx(results[1]["metrics"], rel=1e-5, abs=1e-9)
