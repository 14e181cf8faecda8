"""Stand-ins for the trainers' packages, and for what attach() gives them."""

import importlib
import sys
from types import ModuleType, SimpleNamespace

import torch

ADAPTERS = {
    "hf": "transformers",
    "lightning": "lightning",
    "llamafactory": "transformers",
    "swift": "transformers",
    "axolotl": "transformers",
}


def fresh(monkeypatch, name):
    """Import an adapter anew, and forget it afterwards."""
    for known in [n for n in sys.modules if n.startswith("drift_merge.trainers.")]:
        if known.rpartition(".")[2] in (*ADAPTERS, "verl", "torchtitan"):
            monkeypatch.delitem(sys.modules, known)
    full = f"drift_merge.trainers.{name}"
    monkeypatch.setitem(sys.modules, full, ModuleType(full))
    monkeypatch.delitem(sys.modules, full)
    return importlib.import_module(full)


def stand_in(monkeypatch, name, **contents):
    """Put a module, and the packages above it, where imports find it."""
    parts = name.split(".")
    for end in range(1, len(parts) + 1):
        path = ".".join(parts[:end])
        module = sys.modules.get(path) or ModuleType(path)
        module.__path__ = []
        monkeypatch.setitem(sys.modules, path, module)
    for key, value in contents.items():
        monkeypatch.setattr(sys.modules[name], key, value, raising=False)
    return sys.modules[name]


class TrainerCallback:
    """transformers' has methods that do nothing for every event."""


class DefaultFlowCallback(TrainerCallback):
    pass


class CallbackHandler:
    """As transformers 5.23 has it: callbacks see neither the list nor the trainer."""

    def __init__(self, callbacks):
        self.callbacks = callbacks

    def call(self, event, *args, **kwargs):
        for callback in self.callbacks:
            getattr(callback, event, lambda *_, **__: None)(*args, **kwargs)


class FakeHandle:
    """Remembers what it was attached with."""

    def __init__(self, model, prior, **options):
        self.model, self.prior, self.options = model, prior, options
        self.steps, self.num_biased, self.events, self.seals = 0, 0, [], []

    def trust_weights(self):
        self.events.append("trust")

    def state_dict(self):
        return {"steps": self.steps, "priors": self.seals}

    def load_state_dict(self, state):
        self.steps = state["steps"]

    def metrics(self):
        return {"drift/cosine": 0.5}

    def report(self):
        return {"steps": self.steps}

    def apply(self, *, scale=None, found_inf=None):
        self.num_biased += 1
        self.events.append("apply")

    def remove(self):
        self.events.append("remove")


def state(step=0, **stateful):
    return SimpleNamespace(
        global_step=step, max_steps=9, stateful_callbacks=stateful, log_history=[{}]
    )


CONTROL = SimpleNamespace(should_save=True)


def step(model):
    model(torch.ones(1, 2)).sum().backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
