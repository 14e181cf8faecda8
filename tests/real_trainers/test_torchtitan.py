"""torchtitan's own optimizers container; skipped where it is not installed.

Its Trainer needs an accelerator, so the trainer around the container is a stand-in here. It pins
other versions than .ci/engines: run it in an environment of its own.
"""

import pytest

pytest.importorskip("torchtitan.components.optimizer")

from tests.real_trainers import tiny
from tests.trainers.titan import StandIn

pytestmark = [pytest.mark.engines, pytest.mark.filterwarnings("default")]


def container(model):
    from torchtitan.components.optimizer import OptimizersContainer, ParamGroupConfig

    groups = [
        ParamGroupConfig(pattern=pattern, optimizer_name=name, optimizer_kwargs={"lr": 0.01})
        for pattern, name in ((r".*self_attn.*", "AdamW"), (r".*", "Adam"))
    ]
    return OptimizersContainer.Config(param_groups=groups, implementation="for-loop").build(
        model_parts=[model]
    )


def test_the_container_of_several_optimizers_biases_once_per_step(tmp_path):
    from drift_merge.trainers.torchtitan import attach_to

    setup = tiny.make_setup("smolvlm", tmp_path)
    batch = setup.collate(setup.samples(2))
    plain = tiny.gradients_of(setup.model(), [batch])
    expected = tiny.biased(plain, setup.deltas)
    model = setup.model()
    trainer = StandIn(model, container(model), steps=4)
    attach_to(trainer, setup.prior, schedule="linear")
    trainer.checkpointer.load(step=-1)
    model(**batch).loss.backward()
    seen = {}
    trainer.optimizers.optimizers[0].register_step_pre_hook(
        lambda *_: seen.update(
            {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        )
    )
    trainer.optimizers.step()
    for name, gradient in seen.items():
        assert (gradient.double() - expected[name]).abs().max() < 2e-5, name
    assert len(seen) > len(setup.deltas)
    saved = trainer.checkpointer.states["drift_merge"].state_dict()
    model = setup.model()
    again = StandIn(model, container(model), steps=4)
    attach_to(again, setup.prior, schedule="linear")
    again.checkpointer.found = saved
    again.checkpointer.load(step=-1)
    assert again.checkpointer.states["drift_merge"].handle.steps == 1
