"""The thin adapters against stand-ins of the trainers' interfaces.

Real runs: tests/real_trainers.
"""

import importlib
import json
import sys
from functools import wraps
from types import ModuleType, SimpleNamespace

import pytest
import torch

from drift_merge.errors import RecipeError
from drift_merge.trainers.wiring import options_of_attach
from drift_merge.training.attach import attach as real_attach
from tests.trainers.titan import StandIn
from tests.training.toys import loss_of, make_toy

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


def state(step=0, **stateful):
    return SimpleNamespace(
        global_step=step, max_steps=9, stateful_callbacks=stateful, log_history=[{}]
    )


CONTROL = SimpleNamespace(should_save=True)


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


def step(model):
    model(torch.ones(1, 2)).sum().backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()


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


@pytest.fixture(scope="module")
def toys(tmp_path_factory):
    return [make_toy(tmp_path_factory.mktemp("toy"), seed=seed) for seed in (0, 5)]


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


@pytest.fixture
def lightning(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    stand_in(monkeypatch, "lightning.pytorch", Callback=type("Callback", (), {}))
    return fresh(monkeypatch, "lightning")


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


def test_llamafactory_gets_the_callback_through_run_exp(hf, monkeypatch):
    calls = []
    stand_in(monkeypatch, "llamafactory.train.tuner", run_exp=lambda **given: calls.append(given))
    fresh(monkeypatch, "llamafactory").run_exp("prior/", args={"stage": "sft"}, alpha=2.0)
    (call,) = calls
    assert call["args"] == {"stage": "sft"}
    assert type(call["callbacks"][0]).__name__ == "DriftCallback"


def test_llamafactory_that_drops_the_callback_is_noticed(hf, monkeypatch, model):
    def run_exp(**given):
        step(model)

    stand_in(monkeypatch, "llamafactory.train.tuner", run_exp=run_exp)
    adapter = fresh(monkeypatch, "llamafactory")
    with pytest.raises(RecipeError, match="drops callbacks"):
        adapter.run_exp("prior/")
    step(model)  # afterwards everything is as before
    monkeypatch.setenv("USE_MEGATRON_BRIDGE", "1")
    with pytest.raises(RecipeError, match="USE_MEGATRON_BRIDGE is set"):
        adapter.run_exp("prior/")


def test_swift_without_the_callback_on_its_command_line_is_noticed(hf, monkeypatch, model):
    table = {}
    stand_in(monkeypatch, "swift.callbacks", callbacks_map=table)
    fresh(monkeypatch, "swift").register("prior/", name="mine")
    with pytest.raises(RecipeError, match="--callbacks mine"):
        step(model)
    table["mine"]("args", "trainer").wiring.expectations[0].end()


def test_swift_finds_the_callback_under_its_name(hf, monkeypatch):
    table = {}
    stand_in(monkeypatch, "swift.callbacks", callbacks_map=table)
    module = fresh(monkeypatch, "swift")
    module.register("prior/", name="mine", alpha=2.0)
    assert type(table["mine"]("args", "trainer")).__name__ == "DriftCallback"
    with pytest.raises(RecipeError, match="alhpa"):
        module.register("prior/", alhpa=2.0)


def test_axolotl_reads_the_options_of_its_yaml(hf, monkeypatch):
    def create_model(name, __module__, **fields):
        """pydantic's, of which only the name and the list of fields are used here."""
        return type(name, (), {"model_fields": fields, "__module__": __module__})

    stand_in(monkeypatch, "axolotl.integrations.base", BasePlugin=type("BasePlugin", (), {}))
    stand_in(monkeypatch, "pydantic", create_model=create_model)
    plugin = fresh(monkeypatch, "axolotl").DriftPlugin()
    assert plugin.get_input_args() == "drift_merge.trainers.axolotl.DriftArgs"
    (callback,) = plugin.add_callbacks_post_trainer({"drift_prior": "p/", "drift_alpha": 2.0}, None)
    assert callback._wiring.prior == "p/"
    assert callback._wiring.options == {"alpha": 2.0}
    with pytest.raises(RecipeError, match="no prior"):
        plugin.add_callbacks_post_trainer({}, None)
    keys = {
        key.removeprefix("drift_") for key in fresh(monkeypatch, "axolotl").DriftArgs.model_fields
    }
    assert keys - {"prior"} == set(options_of_attach())


def test_verl_attaches_to_actors_but_not_to_critics_and_keeps_the_state(
    attached, monkeypatch, tmp_path, model
):
    class Actor:
        optimizer_config = SimpleNamespace(total_training_steps=7)

        def _build_optimizer(self, module):
            return "optimizer"

        def save_checkpoint(self, local_path, **_):
            pass

        load_checkpoint = save_checkpoint

    class Critic(Actor):
        pass

    stand_in(
        monkeypatch,
        "verl.workers.engine.fsdp.transformer_impl",
        FSDPEngineWithLMHead=Actor,
        FSDPEngineWithValueHead=Critic,
    )
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    fresh(monkeypatch, "verl").install("prior/", alpha=2.0)
    actor, critic = Actor(), Critic()
    assert [engine._build_optimizer(model) for engine in (actor, critic)] == ["optimizer"] * 2
    (handle,) = attached
    assert handle.options == {"alpha": 2.0, "optimizer": "optimizer", "total_steps": 7}
    handle.steps = 5
    actor.save_checkpoint(str(tmp_path), global_step=5)
    critic.save_checkpoint(str(tmp_path / "absent"))
    handle.steps = 0
    actor.load_checkpoint(str(tmp_path))
    assert handle.steps == 5


def test_verl_refuses_to_train_with_engines_that_make_their_optimizer_elsewhere(
    attached, monkeypatch, model
):
    class Registry:
        _engines = {"language_model": {}, "value_model": {}}  # noqa: RUF012

        @classmethod
        def get_engine_cls(cls, model_type, backend):
            return cls._engines[model_type][backend]["cuda"]

        @classmethod
        def new(cls, model_type, backend, *args):
            return cls.get_engine_cls(model_type, backend)(*args)

    class Base:
        def __init__(self, *, forward_only=False):
            self.engine_config = SimpleNamespace(forward_only=forward_only)
            self.optimizer_config = SimpleNamespace(total_training_steps=7)

        def save_checkpoint(self, local_path, **_):
            pass

        load_checkpoint = save_checkpoint

    class Actor(Base):
        def _build_optimizer(self, module):
            return "optimizer"

    class Critic(Actor):
        pass

    class Veomni(Base):
        def _build_optimizer(self, module):
            return "its own"

    class VeomniActor(Veomni, Actor):
        pass

    class Megatron(Base):
        pass

    class MegatronCritic(Megatron):
        pass

    def register(kind, backend, engine):
        Registry._engines[kind][backend] = {"cuda": engine}

    register("language_model", "fsdp2", Actor)
    register("language_model", "veomni", VeomniActor)
    stand_in(
        monkeypatch,
        "verl.workers.engine.fsdp.transformer_impl",
        FSDPEngineWithLMHead=Actor,
        FSDPEngineWithValueHead=Critic,
        EngineRegistry=Registry,
    )
    verl = fresh(monkeypatch, "verl")
    verl.install("prior/")
    register("language_model", "megatron", Megatron)  # imported later
    register("value_model", "megatron", MegatronCritic)
    Registry.new("language_model", "fsdp2")._build_optimizer(model)
    assert len(attached) == 1
    for backend in ("veomni", "megatron"):
        with pytest.raises(RecipeError, match="makes its optimizer itself") as raised:
            Registry.new("language_model", backend)
        assert "strategy=fsdp2" in raised.value.remedy
        engine = Registry.get_engine_cls("language_model", backend)
        assert engine(forward_only=True).engine_config.forward_only  # a reference policy
    with pytest.raises(RecipeError, match="makes its optimizer itself"):
        VeomniActor()
    Registry.new("value_model", "megatron")
    with pytest.raises(RecipeError, match="called before"):
        verl.install("prior/")


def test_torchtitan_that_loads_no_checkpoint_is_noticed(monkeypatch, model):
    fresh(monkeypatch, "torchtitan").attach_to(StandIn(model, "container", steps=6), "prior/")
    with pytest.raises(RecipeError, match="without having loaded"):
        step(model)


def test_torchtitan_keeps_a_state_for_each_prior(attached, monkeypatch, model):
    trainer = StandIn(model, "container", steps=6)
    titan = fresh(monkeypatch, "torchtitan")
    for prior in ("one/", "two/"):
        titan.attach_to(trainer, prior)
    trainer.checkpointer.load(step=-1)
    assert [handle.prior for handle in attached] == ["one/", "two/"]
    assert list(trainer.checkpointer.states) == ["drift_merge", "drift_merge_2"]


def test_torchtitan_attaches_after_the_checkpoint_is_loaded(attached, monkeypatch, model):
    titan = fresh(monkeypatch, "torchtitan")
    trainer = StandIn(model, "container", steps=6)
    titan.attach_to(trainer, "prior/")
    assert not attached  # the weights are not there yet
    assert trainer.checkpointer.load(step=-1)
    (handle,) = attached
    assert handle.options == {"optimizer": "container", "total_steps": 6, "state": None}
    handle.steps = 4
    saved = trainer.checkpointer.states["drift_merge"].state_dict()
    again = StandIn(model, "container", steps=6)
    titan.attach_to(again, "prior/")
    again.checkpointer.found = saved
    again.checkpointer.load(step=4)
    assert attached[1].options["state"] == {"steps": 4, "priors": []}


def test_torchtitan_without_checkpoints_or_with_a_pipeline(attached, monkeypatch, model):
    titan = fresh(monkeypatch, "torchtitan")
    trainer = StandIn(model, "container", steps=6)
    trainer.checkpointer = SimpleNamespace(load=lambda step: False)
    titan.attach_to(trainer, "prior/")
    assert trainer.checkpointer.load(step=-1) is False
    assert len(attached) == 1
    with pytest.raises(RecipeError, match="2 pipeline stages"):
        titan.attach_to(StandIn(model, "container", steps=6, parts=2), "prior/")
