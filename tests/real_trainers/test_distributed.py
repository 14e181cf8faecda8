"""Trainers over two processes: equal to the hand-written update of one."""

import pytest

pytest.importorskip("transformers")

from tests.real_engines.launch import launch
from tests.real_trainers import tiny

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
        "tests.real_trainers.scenarios.trainer_zero",
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


RULES = ["adaptive_cosine", "absolute"]


@pytest.mark.parametrize(
    ("engine", "use_dora"),
    [("ddp", False), ("fsdp", False), ("fsdp", True), ("zero2", False), ("zero3", False)],
)
def test_lora_over_two_ranks_equals_the_update_of_one(setup, tmp_path, engine, use_dora):
    pytest.importorskip("peft")
    if engine.startswith("zero"):
        pytest.importorskip("deepspeed")
    model, samples = tiny.with_lora(setup, use_dora=use_dora), setup.samples(4)
    batches = [setup.collate(samples[:2]), setup.collate(samples[2:])]
    plain = tiny.gradients_of(model, batches)
    results = launch(
        "tests.real_trainers.scenarios.lora",
        tmp_path / "run",
        source=str(setup.mllm.parent),
        engine=engine,
        rules=RULES,
        use_dora=use_dora,
    )
    for rule in RULES:
        gradients = tiny.biased_factors(model, plain, setup, rule)
        expected = tiny.sgd(model, gradients, RATE)
        metrics = [found[rule]["metrics"] for found in results]
        assert metrics[0] == pytest.approx(metrics[1], rel=1e-5, abs=1e-9)
        assert metrics[0]["drift/bias_ratio"] > 0
        for found in results:
            weights = {n.removeprefix("module."): w for n, w in found[rule]["weights"].items()}
            assert weights.keys() >= gradients.keys()
            for name, values in weights.items():
                difference = (values.double() - expected[name]).abs().max().item()
                assert difference <= 2e-5 * RATE, (rule, name, difference)
