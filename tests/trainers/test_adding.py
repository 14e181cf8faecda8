"""The guide that says how to add a trainer, followed: its adapter is written to a file and used."""

import copy
import importlib
import re
import sys

import pytest
import torch

from drift_merge import guides
from drift_merge.errors import RecipeError
from tests.training.naive import biased, tolerance
from tests.training.toys import loss_of, make_toy, selected

NAME = "name"  # what the guide calls the trainer's package
STEPS, MICRO_BATCHES = 4, 2


class Trainer:
    """A trainer nobody has heard of: accumulates, steps, logs, saves, and calls its callbacks."""

    def __init__(self, model, callbacks):
        self.model, self.callbacks, self.max_steps = model, callbacks, STEPS
        self.optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        self.logs = []

    def train(self, checkpoint=None, stop_after=STEPS):
        first = 0
        if checkpoint is not None:
            self.model.load_state_dict(checkpoint["model"])
            first = checkpoint["step"]
        for callback in self.callbacks:
            callback.on_train_begin(self, checkpoint)
        for step in range(first, stop_after):
            for micro in range(MICRO_BATCHES):
                (loss_of(self.model, seed=100 * step + micro) / MICRO_BATCHES).backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.logs.append({"step": float(step)})
            for callback in self.callbacks:
                callback.on_log(self.logs[-1])
        saved = {"model": copy.deepcopy(self.model.state_dict()), "step": stop_after}
        for callback in self.callbacks:
            callback.on_save(saved)
            callback.on_train_end()
        return saved


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return make_toy(tmp_path_factory.mktemp("toy"))


@pytest.fixture
def adapter(tmp_path, monkeypatch):
    """The module that the guide shows, in a package of its own."""
    [code] = re.findall(
        r'^```text\n(""".*?)^```$', guides.text_of("adding-a-trainer"), re.DOTALL | re.MULTILINE
    )
    (tmp_path / NAME).mkdir()
    (tmp_path / NAME / "__init__.py").touch()
    (tmp_path / NAME / "callbacks.py").write_text("class Callback: ...\n")
    (tmp_path / "added_adapter.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    yield importlib.import_module("added_adapter")
    for module in ("added_adapter", NAME, f"{NAME}.callbacks"):
        sys.modules.pop(module, None)


def test_one_accumulated_step_is_the_update_by_hand(adapter, toy):
    model, plain = toy.model(), toy.model()
    trainer = Trainer(model, [adapter.DriftCallback(toy.prior, rule="gradnorm", alpha=0.5)])
    trainer.train(stop_after=1)
    for micro in range(MICRO_BATCHES):
        (loss_of(plain, seed=micro) / MICRO_BATCHES).backward()
    deltas = toy.deltas()
    found = selected(model)
    for name, parameter in selected(plain).items():
        gradient = biased("gradnorm", parameter.grad, deltas[name], alpha=0.5)
        expected = parameter.detach().double() - 0.1 * gradient
        worst = float((found[name].double() - expected).detach().abs().max())
        assert worst <= tolerance(parameter.grad, expected), name
    assert trainer.logs[0]["drift/bias_ratio"] == pytest.approx(0.5)


def test_a_resumed_run_is_bitwise_equal_to_one_that_went_on(adapter, toy):
    def callbacks():
        return [adapter.DriftCallback(toy.prior, schedule="linear")]

    whole = Trainer(toy.model(), callbacks()).train()
    half = Trainer(toy.model(), callbacks()).train(stop_after=2)
    resumed = Trainer(toy.model(), callbacks()).train(half)
    assert resumed["drift_merge"] == whole["drift_merge"]
    for name, values in whole["model"].items():
        assert torch.equal(resumed["model"][name], values), name


def test_after_training_the_model_is_plain_again(adapter, toy):
    model = toy.model()
    trainer = Trainer(model, [adapter.DriftCallback(toy.prior)])
    trainer.train(stop_after=1)
    plain = Trainer(copy.deepcopy(model), []).train(stop_after=1)
    trainer.callbacks = []
    assert all(
        torch.equal(plain["model"][n], v) for n, v in trainer.train(stop_after=1)["model"].items()
    )


def test_a_typo_fails_before_there_is_a_model(adapter):
    with pytest.raises(RecipeError, match="Did you mean alpha"):
        adapter.DriftCallback("nowhere", alhpa=1.0)


def test_another_prior_is_refused_when_a_run_is_resumed(adapter, toy, tmp_path):
    other = make_toy(tmp_path / "other", seed=5)
    half = Trainer(toy.model(), [adapter.DriftCallback(toy.prior)]).train(stop_after=1)
    with pytest.raises(RecipeError, match="another prior"):
        Trainer(toy.model(), [adapter.DriftCallback(other.prior, strict=False)]).train(half)


def test_without_the_trainers_package_the_adapter_says_how_to_install_it(adapter, monkeypatch):
    monkeypatch.setitem(sys.modules, f"{NAME}.callbacks", None)
    with pytest.raises(RecipeError, match="pip install name"):
        importlib.reload(adapter)
