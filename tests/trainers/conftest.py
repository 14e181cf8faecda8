"""A model, a handle that only remembers, and adapters beside stand-ins of their packages."""

from functools import wraps

import pytest
import torch

from drift_merge.training.attach import attach as real_attach
from tests.trainers.stand_ins import (
    CallbackHandler,
    DefaultFlowCallback,
    FakeHandle,
    TrainerCallback,
    fresh,
    stand_in,
)
from tests.training.toys import make_toy


@pytest.fixture
def hf(monkeypatch):
    stand_in(
        monkeypatch,
        "transformers.trainer_callback",
        TrainerCallback=TrainerCallback,
        DefaultFlowCallback=DefaultFlowCallback,
        CallbackHandler=CallbackHandler,
    )
    return fresh(monkeypatch, "hf")


@pytest.fixture
def attached(monkeypatch):
    made = []

    @wraps(real_attach)  # its signature says which options there are
    def attach(model, prior, **options):
        made.append(FakeHandle(model, prior, **options))
        return made[-1]

    monkeypatch.setattr("drift_merge.trainers.wiring.attach", attach)
    return made


@pytest.fixture
def model():
    return torch.nn.Linear(2, 2)


@pytest.fixture(scope="module")
def toys(tmp_path_factory):
    return [make_toy(tmp_path_factory.mktemp("toy"), seed=seed) for seed in (0, 5)]


@pytest.fixture
def lightning(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    stand_in(monkeypatch, "lightning.pytorch", Callback=type("Callback", (), {}))
    return fresh(monkeypatch, "lightning")
