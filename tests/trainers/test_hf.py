"""The thin adapters against stand-ins of the trainers' interfaces.

Real runs: tests/real_trainers.
"""

import json
import sys
from types import SimpleNamespace

import pytest
import torch

from drift_merge.errors import RecipeError
from tests.trainers.stand_ins import (
    ADAPTERS,
    CONTROL,
    CallbackHandler,
    DefaultFlowCallback,
    TrainerCallback,
    fresh,
    state,
    step,
)
from tests.training.toys import loss_of


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_without_its_package_says_what_to_install(monkeypatch, name):
    for package in ("transformers", "lightning", "pytorch_lightning", "axolotl", "pydantic"):
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(RecipeError, match=ADAPTERS[name]) as raised:
        fresh(monkeypatch, name)
    assert "pip install" in raised.value.remedy


def test_the_callback_attaches_at_the_beginning_and_removes_at_the_end(hf, attached, model):
    callback = hf.DriftCallback("prior/", alpha=0.5, schedule="cosine")
    handler, now = CallbackHandler([DefaultFlowCallback(), callback]), state()
    handler.call("on_train_begin", None, now, CONTROL, model=model, optimizer="opt")
    (handle,) = attached
    assert (handle.model, handle.prior) == (model, "prior/")
    assert handle.options["optimizer"] == "opt"
    assert handle.options["total_steps"] == 9
    assert (handle.options["alpha"], handle.options["schedule"]) == (0.5, "cosine")
    assert handle.options["state"] is None
    handler.call("on_train_end", None, now, CONTROL)
    assert handle.events == ["remove"]
    assert callback.handle is None
    assert callback.report == {"steps": 0}


def test_a_second_training_removes_what_a_broken_first_one_left(hf, attached, model):
    callback = hf.DriftCallback("prior/")
    for _ in range(2):
        callback.on_train_begin(None, state(), CONTROL, model=model, optimizer="opt")
    assert [handle.events for handle in attached] == [["remove"], []]


def test_reporters_before_the_callback_log_its_metrics(hf, attached, model):
    seen = []

    class Reporter(TrainerCallback):
        def on_log(self, *_, logs):
            seen.append(dict(logs))

    default = DefaultFlowCallback()
    handler = CallbackHandler([default, Reporter(), hf.DriftCallback("prior/")])
    now = state()
    handler.call("on_train_begin", None, now, CONTROL, model=model, optimizer="opt")
    assert handler.callbacks[0] is default
    logs = {"loss": 1.0}
    handler.call("on_log", None, now, CONTROL, logs=logs)
    assert seen == [{"loss": 1.0, "drift/cosine": 0.5}]
    assert now.log_history == [logs]
    handler.call("on_log", None, now, CONTROL, logs={"eval_loss": 1.0})
    assert seen[1] == {"eval_loss": 1.0}


def test_the_state_is_in_what_the_trainer_saves_and_comes_back(hf, attached, model):
    callback, now = hf.DriftCallback("prior/"), state()
    callback.on_train_begin(None, now, CONTROL, model=model, optimizer="opt")
    attached[0].steps = attached[0].num_biased = 3
    callback.on_step_end(None, now, CONTROL, model=model)
    saved = json.loads(json.dumps(now.stateful_callbacks))  # as trainer_state.json
    callback.on_train_begin(None, state(3, **saved), CONTROL, model=model, optimizer="opt")
    assert attached[1].options["state"] == {"steps": 3, "priors": []}


def test_weights_that_were_not_loaded_are_refused_or_with_strict_false_warned_of(
    hf, attached, model
):
    callback, now = hf.DriftCallback("prior/"), state()
    callback.on_train_begin(None, now, CONTROL, model=model, optimizer="opt")
    other, resumed = torch.nn.Linear(2, 2), state(1, **now.stateful_callbacks)
    with pytest.raises(hf.VerificationError, match="does not have the weights"):
        callback.on_train_begin(None, resumed, CONTROL, model=other, optimizer="opt")
    lenient = hf.DriftCallback("prior/", strict=False)
    with pytest.warns(UserWarning, match="does not have the weights"):
        lenient.on_train_begin(None, resumed, CONTROL, model=other, optimizer="opt")


def test_a_plain_checkpoint_is_resumed_with_strict_false_only(hf, attached, model):
    with pytest.raises(RecipeError, match="resumes at step 5"):
        hf.DriftCallback("prior/").on_train_begin(
            None, state(5), CONTROL, model=model, optimizer="opt"
        )
    callback = hf.DriftCallback("prior/", strict=False)
    callback.on_train_begin(None, state(5), CONTROL, model=model, optimizer="opt")
    assert attached[0].options["state"] is None


def test_an_adapter_that_gets_no_optimizer_refuses(hf, attached, model):
    with pytest.raises(RecipeError, match="no optimizer"):
        hf.DriftCallback("prior/").on_train_begin(
            None, state(), CONTROL, model=model, optimizer=None
        )


def test_a_step_of_the_trainer_without_a_bias_is_an_error_unless_a_scaler_skipped_it(
    hf, attached, model
):
    callback, now = hf.DriftCallback("prior/"), state()
    callback.on_train_begin(None, now, CONTROL, model=model, optimizer="opt")
    attached[0].num_biased = 1
    callback.on_step_end(None, now, CONTROL, model=model, optimizer="opt")
    skipped = SimpleNamespace(step_was_skipped=True)
    callback.on_step_end(None, now, CONTROL, model=model, optimizer=skipped)
    with pytest.raises(RecipeError, match="1 step of which 0 had the bias"):
        callback.on_step_end(None, now, CONTROL, model=model, optimizer="opt")


def test_a_trainer_that_drops_the_callback_is_noticed_at_its_first_step(hf, model):
    callback = hf.DriftCallback("prior/")
    callback.on_init_end(None, state(), CONTROL, model=model)
    other = torch.nn.Linear(2, 2)
    step(other)  # of no concern
    with pytest.raises(RecipeError, match="dropped"):
        step(model)


def test_two_callbacks_keep_two_states_and_find_their_own_by_the_prior(hf, attached, model, toys):
    def begin(callbacks, now):
        for callback in callbacks:
            callback.on_train_begin(None, now, CONTROL, model=model, optimizer="opt")

    first, second = (hf.DriftCallback(toy.prior.path) for toy in toys)
    now = state()
    begin((first, second), now)
    for number, (handle, toy) in enumerate(zip(attached, toys, strict=True), 3):
        handle.steps, handle.seals = number, [toy.prior.manifest["seal"]]
    saved = json.loads(json.dumps(now.stateful_callbacks, indent=1))
    assert sorted(entry["handle"]["steps"] for entry in saved.values()) == [3, 4]
    again = [hf.DriftCallback(toy.prior.path) for toy in reversed(toys)]  # in the other order
    begin(again, state(3, **saved))
    assert [handle.options["state"]["steps"] for handle in attached[2:]] == [4, 3]


def test_a_second_training_of_the_same_model_names_its_case(hf, toys):
    model = toys[0].model()
    callback, optimizer = hf.DriftCallback(toys[0].prior), torch.optim.SGD(model.parameters(), 0.1)
    callback.on_train_begin(None, state(), CONTROL, model=model, optimizer=optimizer)
    loss_of(model).backward()
    optimizer.step()
    callback.on_step_end(None, state(1), CONTROL, model=model, optimizer=optimizer)
    with pytest.raises(hf.VerificationError, match=r"for 1 steps already.*auto_find_batch_size"):
        callback.on_train_begin(None, state(), CONTROL, model=model, optimizer=optimizer)


@pytest.mark.parametrize("is_loaded", [True, False])
def test_a_state_without_weights_is_compared_with_the_beginning(hf, toys, is_loaded):
    """Sharded weights are not sampled, so what a resumed run has is not known."""
    model = toys[0].model()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    callback, now = hf.DriftCallback(toys[0].prior), state()
    callback.on_train_begin(None, now, CONTROL, model=model, optimizer=optimizer)
    loss_of(model).backward()
    optimizer.step()
    saved = json.loads(json.dumps(now.stateful_callbacks))
    saved[hf.STATE]["weights"] = None
    callback.on_train_end(None, now, CONTROL)
    fresh = model if is_loaded else toys[0].model()
    optimizer = torch.optim.SGD(fresh.parameters(), 0.1)
    again = hf.DriftCallback(toys[0].prior)
    again.on_train_begin(None, state(1, **saved), CONTROL, model=fresh, optimizer=optimizer)
    loss_of(fresh).backward()
    if is_loaded:
        optimizer.step()
    else:
        with pytest.raises(hf.VerificationError, match="were not loaded"):
            optimizer.step()


def test_an_unknown_option_is_refused_when_the_callback_is_made(hf):
    with pytest.raises(RecipeError, match=r"'layer'\. Did you mean layers\?"):
        hf.DriftCallback("prior/", layer="0:2")
    with pytest.raises(RecipeError, match="total_steps"):
        hf.DriftCallback("prior/", total_steps=5)
