"""Real trainers that would train without the prior, and say so; saved states that tell weights."""

import pytest
import torch

from tests.real_trainers import tiny

transformers = pytest.importorskip("transformers")

from drift_merge.errors import RecipeError, VerificationError  # noqa: E402
from drift_merge.trainers.hf import STATE, DriftCallback  # noqa: E402
from tests.real_trainers.hf import InOrder, arguments  # noqa: E402

pytestmark = [pytest.mark.engines, pytest.mark.filterwarnings("default")]


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    return tiny.make_setup("llava", tmp_path_factory.mktemp("llava"))


def trainer_for(setup, out, callbacks, *, model=None, cls=InOrder, **changes):
    return cls(
        model=model if model is not None else setup.model(),
        args=arguments(out, **changes),
        train_dataset=setup.samples(16),
        eval_dataset=setup.samples(2),
        data_collator=setup.collate,
        callbacks=callbacks,
    )


def test_a_trainer_that_makes_its_optimizer_anew_is_noticed(llava, tmp_path):
    class Renew(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            trainer.optimizer = torch.optim.SGD(trainer.model.parameters(), lr=0.1)

    callback = DriftCallback(llava.prior)
    trainer = trainer_for(llava, tmp_path, [callback, Renew()], max_steps=3)
    with pytest.raises(RecipeError, match="SGD that the handle does not know"):
        trainer.train()
    assert trainer.state.global_step == 1


@pytest.mark.parametrize("is_seen", [True, False], ids=["torch", "its own"])
def test_a_trainer_that_gives_no_optimizer_or_steps_another_way_is_noticed(
    llava, tmp_path, is_seen
):
    class Own(InOrder):
        """Takes the steps itself, by an optimizer that its callbacks do not see, or by hand."""

        def create_optimizer(self, *args, **kwargs):
            self.optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
            return self.optimizer

    trainer = trainer_for(llava, tmp_path, [DriftCallback(llava.prior)], cls=Own)
    with pytest.raises(RecipeError, match="does not hold"):
        trainer.train()

    class Hidden(InOrder):
        def _inner_training_loop(self, *args, **kwargs):
            own = self.callback_handler.call_event

            def call_event(event, *given, **options):
                self.callback_handler.optimizer = None if is_seen else self.optimizer
                return own(event, *given, **options)

            self.callback_handler.call_event = call_event
            return super()._inner_training_loop(*args, **kwargs)

        def training_step(self, *args, **kwargs):
            loss = super().training_step(*args, **kwargs)
            self.optimizer.optimizer.step = lambda closure=None: None
            return loss

    trainer = trainer_for(llava, tmp_path, [DriftCallback(llava.prior)], cls=Hidden)
    match = "no optimizer" if is_seen else "1 step of which 0 had the bias"
    with pytest.raises(RecipeError, match=match):
        trainer.train()


def test_a_trainer_that_drops_its_callbacks_is_noticed(llava, tmp_path):
    callback = DriftCallback(llava.prior)
    trainer = trainer_for(llava, tmp_path, [callback])
    trainer.remove_callback(callback)
    with pytest.raises(RecipeError, match="it was dropped"):
        trainer.train()


class SaveAfter(transformers.TrainerCallback):
    """A user's own way to decide on a checkpoint, after our callback has been called."""

    def on_step_end(self, args, state, control, **_):
        control.should_save = state.global_step == 2


@pytest.mark.parametrize(
    "how",
    [
        {"save_strategy": "steps", "save_steps": 2},
        {"save_strategy": "best", "eval_strategy": "steps", "eval_steps": 2,
         "metric_for_best_model": "loss"},
        {"save_strategy": "no"},
    ],
    ids=lambda how: how["save_strategy"],
)  # fmt: skip
def test_weights_that_were_not_loaded_are_refused_however_a_save_was_decided(llava, tmp_path, how):
    options = {"max_steps": 4, **how}
    later = [SaveAfter()] if how["save_strategy"] == "no" else []
    callbacks = [DriftCallback(llava.prior), *later]
    trainer_for(llava, tmp_path, callbacks, **options).train()
    middle = str(tmp_path / "checkpoint-2")
    state = transformers.TrainerState.load_from_json(f"{middle}/trainer_state.json")
    assert state.stateful_callbacks[STATE]["weights"]
    again = trainer_for(llava, tmp_path / "b", [DriftCallback(llava.prior)], **options)
    with pytest.raises(VerificationError, match="does not have the weights of that step"):
        again.train(resume_from_checkpoint=middle)
    loaded = llava._replace(mllm=middle).model()
    trainer_for(llava, tmp_path / "c", [DriftCallback(llava.prior)], model=loaded, **options).train(
        resume_from_checkpoint=middle
    )


def test_a_callback_that_is_listed_twice_is_refused(llava, tmp_path):
    trainer = trainer_for(llava, tmp_path, [DriftCallback(llava.prior) for _ in range(2)])
    with pytest.raises(RecipeError, match="biased by this prior already"):
        trainer.train()


def test_two_callbacks_with_two_priors_resume_exactly_in_any_order(llava, tmp_path):
    import drift_merge

    other = tmp_path / "other"
    reasoner = llava.prior.parent / "reasoner"
    drift_merge.compute(reasoner, llava.mllm, other, dtype="bfloat16", progress=False)
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}

    def callbacks():
        return [DriftCallback(llava.prior, alpha=0.5), DriftCallback(other, schedule="linear")]

    whole = trainer_for(llava, tmp_path / "a", callbacks(), **options)
    whole.train()
    middle = str(tmp_path / "a" / "checkpoint-2")
    model = llava._replace(mllm=middle).model()
    again = trainer_for(llava, tmp_path / "b", callbacks()[::-1], model=model, **options)
    again.train(resume_from_checkpoint=middle)
    handles = [entry["handle"] for entry in again.state.stateful_callbacks.values()
               if "handle" in entry]  # fmt: skip
    assert [handle["steps"] for handle in handles] == [4, 4]


def test_a_second_train_and_a_batch_size_that_is_sought_name_their_case(llava, tmp_path):
    trainer = trainer_for(llava, tmp_path, [DriftCallback(llava.prior)], max_steps=2)
    trainer.train()
    with pytest.raises(VerificationError, match="a second train"):
        trainer.train()

    class Small(InOrder):
        def training_step(self, model, inputs, *args, **kwargs):
            if self.state.global_step == 1 and self._train_batch_size > 1:
                raise RuntimeError("CUDA out of memory. Tried to allocate too much")
            return super().training_step(model, inputs, *args, **kwargs)

    trainer = trainer_for(
        llava, tmp_path, [DriftCallback(llava.prior)], cls=Small, max_steps=2,
        auto_find_batch_size=True,
    )  # fmt: skip
    with pytest.raises(VerificationError, match="auto_find_batch_size"):
        trainer.train()


def test_a_second_adapter_of_peft_that_is_activated_during_training_is_noticed(llava, tmp_path):
    peft = pytest.importorskip("peft")
    model = tiny.with_lora(llava)
    model.add_adapter("second", peft.LoraConfig(r=2, target_modules=tiny.LORA_TARGETS))
    model.set_adapter("default")

    class Switch(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            model.set_adapter("second")

    callbacks = [DriftCallback(llava.prior), Switch()]
    trainer = trainer_for(llava, tmp_path, callbacks, model=model, max_steps=2)
    with pytest.raises(RecipeError, match="active adapters"):
        trainer.train()


def test_bf16_weights_with_a_plain_optimizer_are_warned_of(llava, tmp_path):
    model = llava.model().to(torch.bfloat16)
    callbacks = [DriftCallback(llava.prior)]
    options = {"optim": "adamw_torch", "learning_rate": 1e-6, "lr_scheduler_type": "linear"}
    trainer = trainer_for(
        llava, tmp_path, callbacks, model=model, max_steps=10, warmup_steps=5, **options
    )
    with pytest.warns(UserWarning, match=r"learning rate 1e-06 .* of the weights alone"):
        trainer.train()
