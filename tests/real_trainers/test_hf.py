"""Real runs of transformers' Trainer and TRL's SFTTrainer on tiny MLLMs."""

from pathlib import Path

import pytest
import torch

from tests.real_trainers import tiny

transformers = pytest.importorskip("transformers")

from drift_merge.errors import RecipeError, VerificationError  # noqa: E402
from drift_merge.trainers.hf import STATE, DriftCallback  # noqa: E402
from tests.real_trainers.hf import RATE, InOrder, arguments  # noqa: E402

pytestmark = [pytest.mark.engines, pytest.mark.filterwarnings("default")]


@pytest.fixture(scope="module")
def setups(tmp_path_factory):
    return {name: tiny.make_setup(name, tmp_path_factory.mktemp(name)) for name in tiny.FAMILIES}


@pytest.fixture(scope="module")
def llava(setups):
    return setups["llava"]


def trainer_for(setup, out, callbacks, *, model=None, samples=None, cls=InOrder, **changes):
    return cls(
        model=model if model is not None else setup.model(),
        args=arguments(out, **changes),
        train_dataset=samples or setup.samples(8),
        data_collator=setup.collate,
        callbacks=callbacks,
    )


def after_one_step(setup, samples, batch=2):
    """The hand-written update by one accumulated batch of all samples."""
    model = setup.model()
    parts = range(0, len(samples), batch)
    batches = [setup.collate(samples[at : at + batch]) for at in parts]
    gradients = tiny.gradients_of(model, batches)
    return tiny.sgd(model, tiny.biased(gradients, setup.deltas), RATE)


@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_one_step_of_trainer_is_the_hand_written_update(setups, name, tmp_path):
    setup = setups[name]
    samples = setup.samples(4)
    trainer = trainer_for(setup, tmp_path, [DriftCallback(setup.prior)], samples=samples)
    trainer.train()
    tiny.assert_weights(trainer.model, after_one_step(setup, samples), RATE)


@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_one_step_of_sfttrainer_is_the_hand_written_update(setups, name, tmp_path):
    trl = pytest.importorskip("trl")
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    class Sft(trl.SFTTrainer):
        _get_train_sampler = InOrder._get_train_sampler

    setup = setups[name]
    samples = setup.samples(4)
    words = {f"word{i}": i for i in range(tiny.VOCABULARY)}
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="word0")),
        pad_token="word0",
        eos_token="word2",
    )
    from datasets import Dataset

    rows = Dataset.from_list(
        [{key: value.tolist() for key, value in sample.items()} for sample in samples]
    ).with_format("torch")
    trainer = Sft(
        model=setup.model(),
        args=arguments(
            tmp_path,
            trl.SFTConfig,
            dataset_kwargs={"skip_prepare_dataset": True},
            gradient_checkpointing=False,
            bf16=False,
        ),
        train_dataset=rows,
        data_collator=setup.collate,
        processing_class=tokenizer,
        callbacks=[DriftCallback(setup.prior)],
    )
    trainer.train()
    tiny.assert_weights(trainer.model, after_one_step(setup, samples), RATE)
    assert "drift/cosine" in trainer.state.log_history[0]


def test_the_bias_enters_after_clipping_and_before_the_step_once_per_step(llava, tmp_path):
    order = []

    def rule(sums):
        order.append("bias")
        return torch.zeros_like(sums.grad_sq)

    class Watch(transformers.TrainerCallback):
        def __getattribute__(self, event):
            if event in ("on_substep_end", "on_optimizer_step", "on_step_end"):
                return lambda *_, **__: order.append(event)
            return super().__getattribute__(event)

        def on_pre_optimizer_step(self, *_, model, **__):
            found = [p.grad for p in model.parameters() if p.grad is not None]
            norm = torch.cat([gradient.flatten() for gradient in found]).norm().item()
            order.append(f"clipped to {norm:.4f}")

    callbacks = [Watch(), DriftCallback(llava.prior, rule=rule, alpha=1.0)]
    trainer_for(llava, tmp_path, callbacks, max_steps=2, max_grad_norm=0.01).train()
    one = ["on_substep_end", "clipped to 0.0100", "bias", "on_optimizer_step", "on_step_end"]
    assert [what for what in order if what != "bias"] == [w for w in one if w != "bias"] * 2
    assert order.count("bias") % 2 == 0
    between = order[order.index("clipped to 0.0100") + 1 : order.index("on_optimizer_step")]
    assert set(between) == {"bias"}


def test_metrics_reach_the_history_and_a_reporter_that_comes_first(llava, tmp_path):
    seen = []

    class Reporter(transformers.TrainerCallback):
        def on_log(self, args, state, control, logs=None, **_):
            seen.append(dict(logs))

    callbacks = [Reporter(), DriftCallback(llava.prior)]
    trainer = trainer_for(llava, tmp_path, callbacks, max_steps=2)
    trainer.train()
    for logs in (*seen[:2], *trainer.state.log_history[:2]):
        for key in ("drift/cosine", "drift/bias_ratio", "drift/coefficient", "drift/alpha"):
            assert isinstance(logs[key], float)
        assert "drift/attn/cosine" in logs
    assert "drift/cosine" not in seen[-1]  # the summary at the end is not of a step
    assert callbacks[1].report is not None


def test_training_ends_with_plain_training(llava, tmp_path):
    callback = DriftCallback(llava.prior)
    trainer = trainer_for(llava, tmp_path, [callback])
    trainer.train()
    assert callback.handle is None
    model = trainer.model
    batch = llava.collate(llava.samples(2, seed=9))
    gradients = tiny.gradients_of(model, [batch])
    expected = tiny.sgd(model, {name: g.double() for name, g in gradients.items()}, RATE)
    model(**batch).loss.backward()
    trainer.optimizer.step()
    tiny.assert_weights(model, expected, RATE)


SCHEDULED = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "optim": "adamw_torch"}


def weights(trainer):
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


@pytest.mark.parametrize("name", ["llava", "smolvlm"])
@pytest.mark.parametrize("elsewhere", [False, True], ids=["same", "other"])
def test_a_resumed_run_continues_exactly(setups, name, tmp_path, elsewhere):
    setup = setups[name]
    options = {"schedule": "cosine", "alpha": {"attn": 1.0, "mlp": 0.5}}
    whole = trainer_for(setup, tmp_path / "a", [DriftCallback(setup.prior, **options)], **SCHEDULED)
    whole.train()
    out, middle = tmp_path / ("b" if elsewhere else "a"), str(tmp_path / "a" / "checkpoint-2")
    # LLaVA's names on the disk are others than in memory, and Trainer then loads nothing.
    model = setup._replace(mllm=middle).model() if name == "llava" else None
    callback = DriftCallback(setup.prior, **options)
    resumed = trainer_for(setup, out, [callback], model=model, **SCHEDULED)
    resumed.train(resume_from_checkpoint=middle)
    for name, expected in weights(whole).items():
        assert torch.equal(weights(resumed)[name], expected), name
    keys = ("loss", "drift/alpha", "drift/cosine", "drift/distance")
    for step in (3, 4):
        one, other = (
            next(log for log in trainer.state.log_history if log["step"] == step)
            for trainer in (whole, resumed)
        )
        assert [one[key] for key in keys] == [other[key] for key in keys]


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_a_checkpoint_that_the_trainer_did_not_load_is_noticed(setups, name, tmp_path):
    setup = setups[name]
    trainer_for(setup, tmp_path, [DriftCallback(setup.prior)], **SCHEDULED).train()
    again = trainer_for(setup, tmp_path, [DriftCallback(setup.prior)], **SCHEDULED)
    with pytest.raises(VerificationError, match="does not have the weights of that step"):
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


@pytest.mark.parametrize("kind", [{}, {"use_rslora": True}, {"use_dora": True}], ids=str)
def test_lora_in_a_trainer_is_the_update_by_hand_and_resumes_exactly(llava, tmp_path, kind):
    pytest.importorskip("peft")
    model, samples = tiny.with_lora(llava, **kind), llava.samples(4)
    batches = [llava.collate(samples[:2]), llava.collate(samples[2:])]
    plain = tiny.gradients_of(model, batches)
    biased = tiny.biased_factors(model, plain, llava, "adaptive_cosine")
    expected = tiny.sgd(model, biased, RATE)
    one = [DriftCallback(llava.prior)]
    trainer = trainer_for(llava, tmp_path / "one", one, model=model, samples=samples)
    trainer.train()
    tiny.assert_weights(trainer.model, expected, RATE)

    def run(out, checkpoint=None):
        callbacks = [DriftCallback(llava.prior, schedule="linear")]
        model = tiny.with_lora(llava, **kind)
        trainer = trainer_for(llava, tmp_path / out, callbacks, model=model, **SCHEDULED)
        trainer.train(resume_from_checkpoint=checkpoint)
        return weights(trainer)

    whole = run("whole")
    resumed = run("resumed", str(tmp_path / "whole" / "checkpoint-2"))
    for name, values in whole.items():
        assert torch.equal(values, resumed[name]), name


def test_resuming_with_another_prior_is_an_error(llava, setups, tmp_path):
    trainer_for(llava, tmp_path, [DriftCallback(llava.prior)], **SCHEDULED).train()
    import drift_merge

    other = tmp_path / "other"
    reasoner = Path(llava.prior).parent / "reasoner"
    drift_merge.compute(reasoner, llava.mllm, other, dtype="bfloat16", progress=False)
    middle = str(tmp_path / "checkpoint-2")
    model = llava._replace(mllm=middle).model()
    again = trainer_for(llava, tmp_path, [DriftCallback(other)], model=model, **SCHEDULED)
    with pytest.raises(RecipeError, match="another prior"):
        again.train(resume_from_checkpoint=middle)


def test_resuming_a_plain_run_with_a_prior_needs_strict_false(llava, tmp_path):
    trainer_for(llava, tmp_path, [], **SCHEDULED).train()
    checkpoint = str(tmp_path / "checkpoint-2")
    with pytest.raises(RecipeError, match="resumes at step 2"):
        trainer_for(llava, tmp_path, [DriftCallback(llava.prior)], **SCHEDULED).train(
            resume_from_checkpoint=checkpoint
        )
    allowed = trainer_for(llava, tmp_path, [DriftCallback(llava.prior, strict=False)], **SCHEDULED)
    allowed.train(resume_from_checkpoint=checkpoint)
    assert allowed.state.stateful_callbacks[STATE]


def test_an_unknown_option_fails_before_anything_is_loaded():
    with pytest.raises(RecipeError, match=r"'alpa'\. Did you mean alpha\?"):
        DriftCallback("nowhere", alpa=1.0)
    with pytest.raises(RecipeError, match="optimizer"):
        DriftCallback("nowhere", optimizer=None)


def test_a_model_of_another_family_is_refused_when_training_begins(llava, setups, tmp_path):
    model = setups["qwen2_5_vl"]
    trainer = trainer_for(model, tmp_path, [DriftCallback(llava.prior)])
    from drift_merge.errors import AlignmentError

    with pytest.raises(AlignmentError):
        trainer.train()
