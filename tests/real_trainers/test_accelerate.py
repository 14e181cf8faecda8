"""A hand-written loop with accelerate: no adapter, attach() takes its optimizer."""

import pytest
import torch

accelerate = pytest.importorskip("accelerate")
pytest.importorskip("transformers")

from drift_merge import attach  # noqa: E402
from tests.real_trainers import tiny  # noqa: E402

pytestmark = [pytest.mark.engines, pytest.mark.filterwarnings("default")]

RATE = 0.5


def test_one_accumulated_step_is_the_hand_written_update(tmp_path):
    setup = tiny.make_setup("smolvlm", tmp_path)
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = setup.model()
    samples = setup.samples(4)
    batches = [setup.collate(samples[:2]), setup.collate(samples[2:])]
    plain = tiny.gradients_of(model, batches)
    expected = tiny.sgd(model, tiny.biased(plain, setup.deltas), RATE)
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=RATE))
    handle = attach(model, setup.prior, optimizer=optimizer)
    for batch in batches:
        with accelerator.accumulate(model):
            accelerator.backward(model(**batch).loss)
            optimizer.step()
            optimizer.zero_grad()
    assert handle.steps == 1
    tiny.assert_weights(accelerator.unwrap_model(model), expected, RATE)
