"""The adapter of Lightning, beside a stand-in of it."""

from types import SimpleNamespace

import pytest
import torch

from drift_merge.errors import RecipeError


def fit(**changes):
    values = {
        "optimizers": [object()],
        "strategy": SimpleNamespace(model=torch.nn.Linear(1, 1)),
        "estimated_stepping_batches": 4,
        "loggers": [object()],
        "global_step": 0,
        "log_every_n_steps": 2,
    }
    return SimpleNamespace(**values | changes)


def test_lightning_applies_before_the_step_and_logs_as_often_as_the_trainer(
    lightning, attached, model
):
    callback, logged = lightning.DriftCallback("prior/"), []
    module = model
    module.log_dict = logged.append
    callback.on_train_start(fit(), module)
    (handle,) = attached
    assert "optimizer" not in handle.options
    assert handle.options["total_steps"] == 4
    for step in range(2):
        callback.on_before_optimizer_step(fit(global_step=step), module, None)
    assert handle.events == ["apply", "apply"]
    assert logged == [{"drift/cosine": 0.5}]
    handle.steps = 2
    saved = callback.state_dict()
    callback.on_train_end(fit(), module)
    assert handle.events[-1] == "remove"
    again = lightning.DriftCallback("prior/")
    again.load_state_dict(saved)
    again.on_train_start(fit(estimated_stepping_batches=float("inf")), module)
    assert attached[1].options["state"] == {"steps": 2, "priors": []}
    assert attached[1].options["total_steps"] is None


def test_lightning_compares_its_steps_with_the_biased_ones(lightning, attached, model):
    callback = lightning.DriftCallback("prior/")
    callback.on_train_start(fit(), model)
    callback.on_before_optimizer_step(fit(loggers=[]), model, None)
    callback.on_train_batch_end(fit(global_step=1), model, None, None, 0)
    callback.on_train_batch_end(fit(global_step=1), model, None, None, 1)  # accumulating
    with pytest.raises(RecipeError, match="2 steps of which 0"):
        callback.on_train_batch_end(fit(global_step=3), model, None, None, 2)


def test_lightning_hooks_a_fused_optimizer_under_a_scaler(lightning, attached, model):
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    plugin = SimpleNamespace(scaler=torch.amp.GradScaler("cpu"))
    for given, hooked in ((optimizer, optimizer), (torch.optim.SGD(model.parameters()), None)):
        trainer = fit(optimizers=[given], precision_plugin=plugin)
        lightning.DriftCallback("prior/").on_train_start(trainer, model)
        assert attached[-1].options.get("optimizer") is hooked


def test_lightning_refuses_a_checkpoint_without_its_state(lightning, attached, model):
    with pytest.raises(RecipeError, match="resumes at step 2"):
        lightning.DriftCallback("prior/").on_train_start(fit(global_step=2), model)


def test_lightning_refuses_two_optimizers(lightning, attached):
    with pytest.raises(RecipeError, match="2 optimizers"):
        lightning.DriftCallback("prior/").on_train_start(fit(optimizers=[1, 2]), None)
