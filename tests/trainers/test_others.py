"""The other adapters, beside stand-ins of their packages."""

from types import SimpleNamespace

import pytest
import torch

from drift_merge.errors import RecipeError
from drift_merge.trainers.wiring import options_of_attach
from tests.trainers.stand_ins import fresh, stand_in, step
from tests.trainers.titan import StandIn


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
