"""Lightning: a callback for `lightning` and `pytorch_lightning`.

    from drift_merge.trainers.lightning import DriftCallback
    trainer = L.Trainer(..., callbacks=[DriftCallback("prior/", alpha=1.0)])

The bias enters in `on_before_optimizer_step`: after accumulation and unscaling, before clipping.
A hook of the optimizer would be wrong here, because Lightning steps with a closure that computes
the gradients after such hooks have run. With the DeepSpeed strategy the engine's step is wrapped.
"""

from importlib.util import find_spec
from typing import Any

from drift_merge.errors import RecipeError
from drift_merge.trainers.wiring import Wiring, optional
from drift_merge.training.gradients.deepspeed import is_deepspeed
from drift_merge.training.handle import Handle

_OLD = find_spec("lightning") is None and find_spec("pytorch_lightning") is not None
_lightning = optional(
    "pytorch_lightning" if _OLD else "lightning.pytorch", install="pip install lightning"
)


class DriftCallback(_lightning.Callback):  # type: ignore[misc, name-defined]
    """Bias the gradients of a LightningModule with a prior. State goes into the checkpoints."""

    def __init__(self, prior: Any, **options: Any) -> None:
        """Keep what `attach` will be given when training begins; as for `hf.DriftCallback`."""
        self._wiring = Wiring(prior, options)
        self._saved: dict[str, Any] | None = None
        self._is_hooked = False

    @property
    def handle(self) -> Handle | None:
        """The handle while training."""
        return self._wiring.handle

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Attach, with the state of the checkpoint if the run is resumed."""
        if len(trainer.optimizers) != 1:
            raise RecipeError(
                f"the module has {len(trainer.optimizers)} optimizers; one is supported.",
                remedy="Call attach() in the module and handle.apply() before the right step.",
            )
        engine = trainer.strategy.model
        self._is_hooked = is_deepspeed(engine)
        steps = trainer.estimated_stepping_batches
        self._wiring.start(
            pl_module,
            optimizer=engine if self._is_hooked else None,
            total_steps=int(steps) if steps != float("inf") else None,
            state=self._saved,
        )

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """Bias the gradients, and log as often as the trainer does."""
        if self.handle is None:
            return
        if not self._is_hooked:
            self.handle.apply()
        if trainer.loggers and (trainer.global_step + 1) % trainer.log_every_n_steps == 0:
            pl_module.log_dict(self.handle.metrics())

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Go back to plain training."""
        self._wiring.stop()

    def state_dict(self) -> dict[str, Any]:
        """What Lightning puts into a checkpoint."""
        return dict(self.handle.state_dict()) if self.handle is not None else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """What Lightning has found in a checkpoint; used when training begins."""
        self._saved = state_dict or None
