"""Real runs of Lightning on a tiny MLLM."""

import pytest
import torch

lightning = pytest.importorskip("lightning")
pytest.importorskip("transformers")

from drift_merge.errors import RecipeError  # noqa: E402
from drift_merge.trainers.lightning import DriftCallback  # noqa: E402
from tests.real_trainers import tiny  # noqa: E402

pytestmark = [pytest.mark.engines, pytest.mark.filterwarnings("default")]

RATE = 0.5


@pytest.fixture(scope="module")
def setup(tmp_path_factory):
    return tiny.make_setup("llava", tmp_path_factory.mktemp("llava"))


class Module(lightning.LightningModule):
    def __init__(self, model, kind=torch.optim.SGD):
        super().__init__()
        self.model, self.kind = model, kind

    def training_step(self, batch, _):
        return self.model(**batch).loss

    def configure_optimizers(self):
        return self.kind(self.model.parameters(), lr=RATE)


def fit(setup, out, callbacks, *, module=None, checkpoint=None, steps=1, samples=None, **options):
    module = module or Module(setup.model())
    values = {
        "max_steps": steps,
        "accumulate_grad_batches": 2,
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": out,
        "callbacks": callbacks,
    }
    loader = torch.utils.data.DataLoader(
        samples or setup.samples(16), batch_size=2, shuffle=False, collate_fn=setup.collate
    )
    trainer = lightning.Trainer(**values | options)
    trainer.fit(module, loader, ckpt_path=checkpoint)
    return trainer, module


def test_one_accumulated_step_is_the_hand_written_update(setup, tmp_path):
    _, module = fit(setup, tmp_path, [DriftCallback(setup.prior)])
    model = setup.model()
    samples = setup.samples(4)
    batches = [setup.collate(samples[:2]), setup.collate(samples[2:])]
    expected = tiny.sgd(model, tiny.biased(tiny.gradients_of(model, batches), setup.deltas), RATE)
    tiny.assert_weights(module.model, expected, RATE)


def test_the_bias_enters_once_per_step_before_clipping(setup, tmp_path):
    order = []

    class Watched(Module):
        def configure_gradient_clipping(self, *args, **kwargs):
            order.append("clip")
            super().configure_gradient_clipping(*args, **kwargs)

        def optimizer_zero_grad(self, *args, **kwargs):
            order.append("zero")
            super().optimizer_zero_grad(*args, **kwargs)

    def rule(sums):
        if order[-1] != "bias":
            order.append("bias")
        return torch.ones_like(sums.grad_sq)

    module = Watched(setup.model())
    fit(
        setup,
        tmp_path,
        [DriftCallback(setup.prior, rule=rule, alpha=1.0)],
        module=module,
        steps=2,
        gradient_clip_val=1.0,
    )
    assert order == ["zero", "bias", "clip"] * 2


def test_metrics_reach_the_logger(setup, tmp_path):
    class Logger(lightning.pytorch.loggers.logger.DummyLogger):
        logged: list = []  # noqa: RUF012

        def log_metrics(self, metrics, step):
            self.logged.append(metrics)

    logger = Logger()
    callbacks = [DriftCallback(setup.prior)]
    fit(setup, tmp_path, callbacks, steps=2, logger=logger, log_every_n_steps=1)
    assert {"drift/cosine", "drift/bias_ratio", "drift/attn/cosine"} <= set().union(*logger.logged)


def test_a_resumed_run_continues_exactly(setup, tmp_path):
    def callback():
        return DriftCallback(setup.prior, schedule="cosine")

    saver = lightning.pytorch.callbacks.ModelCheckpoint(
        tmp_path, filename="{step}", every_n_train_steps=2, save_top_k=-1
    )
    # Lightning begins the data anew in the middle of an epoch; so all batches are equal here.
    options = {"steps": 4, "samples": setup.samples(2) * 8}
    adam = torch.optim.AdamW
    _, whole = fit(
        setup,
        tmp_path,
        [callback(), saver],
        module=Module(setup.model(), adam),
        enable_checkpointing=True,
        **options,
    )
    middle = tmp_path / "step=2.ckpt"
    resumed_callback = callback()
    _, resumed = fit(
        setup,
        tmp_path / "again",
        [resumed_callback],
        module=Module(setup.model(), adam),
        checkpoint=str(middle),
        **options,
    )
    for (name, one), (_, other) in zip(
        whole.named_parameters(), resumed.named_parameters(), strict=True
    ):
        assert torch.equal(one, other), name


def test_training_ends_with_plain_training(setup, tmp_path):
    callback = DriftCallback(setup.prior)
    fit(setup, tmp_path, [callback])
    assert callback.handle is None


def test_two_optimizers_are_refused(setup, tmp_path):
    class Two(Module):
        automatic_optimization = False

        def configure_optimizers(self):
            return [torch.optim.SGD(self.model.parameters(), lr=RATE) for _ in range(2)]

    with pytest.raises(RecipeError, match="2 optimizers"):
        fit(
            setup,
            tmp_path,
            [DriftCallback(setup.prior)],
            module=Two(setup.model()),
            accumulate_grad_batches=1,
        )


@pytest.mark.parametrize("rule", ["absolute", "adaptive_cosine"])
def test_a_fused_optimizer_under_a_scaler_gets_the_bias_of_unscaled_gradients(
    setup, tmp_path, rule
):
    """Lightning leaves unscaling to it; the scale is 65,536 at first."""
    from lightning.pytorch.plugins.precision import MixedPrecision

    class Fused(Module):
        def __init__(self, model, *, fused):
            super().__init__(model)
            self.fused = fused

        def configure_optimizers(self):
            return torch.optim.SGD(self.model.parameters(), lr=RATE, fused=self.fused)

    found = []
    for fused in (False, True):
        scaler = torch.amp.GradScaler("cpu")
        plugin = MixedPrecision("16-mixed", "cpu", scaler=scaler)
        plugin.autocast_context_manager = lambda: torch.autocast("cpu", enabled=False)
        callback = DriftCallback(setup.prior, rule=rule, alpha=1.0)
        _, module = fit(
            setup, tmp_path, [callback], module=Fused(setup.model(), fused=fused), plugins=[plugin]
        )
        found.append(module.model)
    tiny.assert_weights(found[1], dict(found[0].named_parameters()), RATE)


def test_a_step_that_the_scaler_skips_is_not_counted(setup, tmp_path):
    from lightning.pytorch.plugins.precision import MixedPrecision

    steps = []

    class Overflow(Module):
        def on_before_optimizer_step(self, optimizer):
            steps.append(callback.handle.steps)

        def on_after_backward(self):
            if not steps:  # the first step
                self.model.lm_head.weight.grad[0, 0] = float("inf")

    plugin = MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu"))
    plugin.autocast_context_manager = lambda: torch.autocast("cpu", enabled=False)
    callback = DriftCallback(setup.prior)
    module = Overflow(setup.model())
    fit(setup, tmp_path, [callback], module=module, plugins=[plugin], steps=3)
    assert steps == [0, 1, 2]


def test_the_same_prior_in_two_callbacks_is_refused(setup, tmp_path):
    other = DriftCallback([setup.prior], alpha=0.5)
    assert DriftCallback(setup.prior).state_key == other.state_key  # of the same prior
    with pytest.raises(RuntimeError, match="state_key"):
        fit(setup, tmp_path, [DriftCallback(setup.prior), other])
