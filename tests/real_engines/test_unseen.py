"""What would go wrong without a word: late copies, initialized states, weights not loaded."""

import pytest
import torch

pytestmark = [pytest.mark.engines, pytest.mark.timeout(400)]
HERE = "tests.real_engines.unseen."


def is_equal(one, other):
    return all(torch.equal(weights, other[name]) for name, weights in one.items())


def test_late_copies_of_offloaded_gradients_change_no_bit(run_once):
    pytest.importorskip("deepspeed")
    for found in run_once(f"{HERE}offload"):
        assert is_equal(found["plain"], found["plain late"])  # the simulation is fair
        assert is_equal(found["biased"], found["biased late"])
        assert not is_equal(found["biased"], found["plain"])


def test_states_that_fsdp2_initializes_are_no_steps(run_once):
    for found in run_once(f"{HERE}initialized_states"):
        assert found["is_zero"]
        assert found["counted"] == 0
        for order in ("first", "last"):
            assert found[f"steps {order}"] == 4
            assert is_equal(found["whole"], found[f"attached {order}"])


@pytest.mark.parametrize(
    "settings",
    [{"engine": "fsdp"}, {"engine": "deepspeed", "stage": 2}, {"engine": "deepspeed", "stage": 3}],
    ids=["fsdp2", "zero2", "zero3"],
)
def test_sharded_weights_that_were_not_loaded_are_refused(run_once, settings):
    if settings["engine"] == "deepspeed":
        pytest.importorskip("deepspeed")
    for found in run_once(f"{HERE}weights_not_loaded", **settings):
        assert "were not loaded" in found["error"]
