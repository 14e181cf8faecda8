"""Lightning: a callback for `lightning` and `pytorch_lightning`.

    from drift_merge.trainers.lightning import DriftCallback
    trainer = L.Trainer(..., callbacks=[DriftCallback("prior/", alpha=1.0)])

The bias enters in `on_before_optimizer_step`: after accumulation and unscaling, before clipping.
A hook of the optimizer would be wrong here, because Lightning steps with a closure that computes
the gradients after such hooks have run. Two exceptions: with the DeepSpeed strategy the engine's
step is wrapped; and a fused optimizer under a GradScaler ("16-mixed") is hooked, since it unscales
within its step, which Lightning then calls without a closure.
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
        self._num_steps = 0  # the trainer's, when they were last compared

    @property
    def handle(self) -> Handle | None:
        """The handle while training."""
        return self._wiring.handle

    @property
    def state_key(self) -> str:
        """Of this prior, among the states of a checkpoint: several callbacks have several."""
        return f"{type(self).__qualname__}{self._wiring.seals()}"

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Attach, with the state of the checkpoint if the run is resumed."""
        if len(trainer.optimizers) != 1:
            raise RecipeError(
                f"the module has {len(trainer.optimizers)} optimizers; one is supported.",
                remedy="Call attach() in the module and handle.apply() before the right step.",
            )
        if trainer.global_step and not self._saved and self._wiring.options.get("strict", True):
            raise RecipeError(
                f"this run resumes at step {trainer.global_step:,} from a checkpoint without this"
                " DriftCallback's state: it was trained without this prior so far.",
                remedy="Resume from a checkpoint that was trained with it, or start the prior's"
                " schedule here: DriftCallback(..., strict=False)",
            )
        hooked = _stepper(trainer)
        self._is_hooked = hooked is not None
        steps = trainer.estimated_stepping_batches
        self._wiring.start(
            pl_module,
            total_steps=int(steps) if steps != float("inf") else None,
            state=self._saved,
            **({} if hooked is None else {"optimizer": hooked}),
        )
        self._num_steps = trainer.global_step

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """Bias the gradients, and log as often as the trainer does."""
        if self.handle is None:
            return
        if not self._is_hooked:
            self.handle.apply(found_inf=_found_inf(_scaler(trainer), optimizer))
        if trainer.loggers and (trainer.global_step + 1) % trainer.log_every_n_steps == 0:
            pl_module.log_dict(self.handle.metrics())

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        """Refuse to go on after a step that had no bias."""
        made, self._num_steps = trainer.global_step - self._num_steps, trainer.global_step
        self._wiring.require_biased(made)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Go back to plain training."""
        self._wiring.stop()

    def state_dict(self) -> dict[str, Any]:
        """What Lightning puts into a checkpoint."""
        return dict(self.handle.state_dict()) if self.handle is not None else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """What Lightning has found in a checkpoint; used when training begins."""
        self._saved = state_dict or None


def _stepper(trainer: Any) -> Any:
    """What must be hooked, because gradients are not ready in `on_before_optimizer_step`."""
    engine, (optimizer,) = trainer.strategy.model, trainer.optimizers
    if is_deepspeed(engine):
        return engine
    is_fused = getattr(optimizer, "_step_supports_amp_scaling", False)
    return optimizer if is_fused and _scaler(trainer) is not None else None


def _scaler(trainer: Any) -> Any:
    """The GradScaler of "16-mixed", if there is one."""
    return getattr(getattr(trainer, "precision_plugin", None), "scaler", None)


def _found_inf(scaler: Any, optimizer: Any) -> Any:
    """What GradScaler has found when it unscaled; other than 0: it will skip the step."""
    found = {} if scaler is None else scaler._found_inf_per_device(optimizer)
    values = list(found.values())
    return sum(value.to(values[0].device) for value in values) if values else None
