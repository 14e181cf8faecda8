"""Hugging Face: a callback for transformers' Trainer and TRL's SFTTrainer.

    from drift_merge.trainers.hf import DriftCallback
    trainer = SFTTrainer(..., callbacks=[DriftCallback("prior/", alpha=1.0)])

Before each step of the optimizer, after accumulation, reduction, unscaling and clipping, the
gradients are biased. Under DeepSpeed, where accelerate's backward also steps, ZeRO's own step is
wrapped: there the bias comes before DeepSpeed's unscaling and clipping.

The state is a part of `trainer_state.json`, written with each checkpoint, so that a checkpoint
has it or is not whole, and a resumed run continues exactly. After each step the trainer's count is
compared with what was biased.
"""

import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch

from drift_merge.errors import RecipeError, VerificationError
from drift_merge.trainers.wiring import Expectation, Wiring, optional
from drift_merge.training.handle import Handle

_callback = optional("transformers.trainer_callback", install="pip install 'drift_merge[train]'")

_SAMPLE = 32  # values of each of two parameters
STATE = "drift_merge"  # key in the trainer's stateful_callbacks; not the name of a class


class _Live(dict[str, Any]):
    """An entry of the trainer's state whose values are taken when the state is written."""

    def __init__(
        self,
        values: Any = (),
        fetch: Callable[[], dict[str, Any]] | None = None,
        home: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(values)
        self._fetch, self.home = fetch, home

    def items(self) -> Any:
        if self._fetch is not None:
            self.update(self._fetch())
        return super().items()

    def __reduce__(self) -> Any:
        return dict, (dict(self.items()),)  # a copy is plain data


class DriftCallback(_callback.TrainerCallback):  # type: ignore[misc, name-defined]
    """Bias the gradients of a Trainer with a prior.

    Attributes:
        report: what `Handle.report()` said when training ended.
    """

    def __init__(self, prior: Any, **options: Any) -> None:
        """Keep what `attach` will be given when training begins.

        Args:
            prior: as for `attach`: a directory, a Hub id, an opened prior, or a list of these.
            options: keyword arguments of `attach`, except optimizer, total_steps and state.

        Raises:
            RecipeError: an unknown option.
        """
        self._wiring = Wiring(prior, options)
        self._state: dict[str, Any] = {}  # the last one
        self._model: Any = None
        self.report: dict[str, Any] | None = None

    @property
    def handle(self) -> Handle | None:
        """The handle while training."""
        return self._wiring.handle

    @property
    def wiring(self) -> Wiring:
        """The prior and the options; for adapters of trainers that take callbacks."""
        return self._wiring

    def on_init_end(
        self, args: Any, state: Any, control: Any, *, model: Any = None, **_: Any
    ) -> None:
        """From now on this model is not to be trained without us."""
        if model is not None:
            expected = Expectation(
                "the trainer has made a step without calling its DriftCallback: it was dropped,"
                " and the prior with it.",
                "Use a trainer that calls on_train_begin of transformers' callbacks, or attach() in"
                " a loop of your own (drift-prior guide own-trainer). To train without the prior"
                " give no DriftCallback.",
                model,
            )
            self._wiring.expectations.append(expected)

    def on_train_begin(
        self, args: Any, state: Any, control: Any, *, model: Any, optimizer: Any, **_: Any
    ) -> None:
        """Attach, with the state of the checkpoint if the run is resumed."""
        _log_before_reporters(self)
        key, saved = self._saved(state.stateful_callbacks)
        is_strict = self._wiring.options.get("strict", True)
        if state.global_step and saved is None and is_strict:
            raise RecipeError(
                f"this run resumes at step {state.global_step:,} from a checkpoint without a"
                " DriftCallback's state: it was trained without the prior so far.",
                remedy="Resume from a checkpoint that was trained with it, or start the prior's"
                " schedule here: DriftCallback(..., strict=False)",
            )
        is_known = saved is not None and _check_weights(
            model, saved["weights"], state.global_step, is_strict=is_strict
        )
        handle = self._wiring.start(
            model,
            optimizer=optimizer,
            total_steps=state.max_steps,
            state=None if saved is None else saved["handle"],
        )
        if is_known:
            handle.trust_weights()
        self._model = model
        states = state.stateful_callbacks
        states[key] = _Live(self._fetch(), self._fetch, home=states)

    def on_step_end(
        self, args: Any, state: Any, control: Any, *, optimizer: Any = None, **_: Any
    ) -> None:
        """Refuse to go on after a step that had no bias."""
        is_skipped = bool(getattr(optimizer, "step_was_skipped", False))
        self._wiring.require_biased(0 if is_skipped else 1)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Add the metrics to what the trainer logs of training."""
        if self.handle is not None and logs is not None and "loss" in logs:
            logs.update(self.handle.metrics())
            state.log_history[-1].update(logs)  # the trainer has copied them there before

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Keep the last report; go back to plain training."""
        if self.handle is not None:
            self.report = self.handle.report()
            self._fetch()
        self._wiring.stop()
        self._model = None

    def _fetch(self) -> dict[str, Any]:
        """The state as it is now, and a few weights; as it was at the end after training."""
        if self.handle is not None:
            self._state = {"handle": self.handle.state_dict(), "weights": _sample(self._model)}
        return self._state

    def _saved(self, states: dict[str, Any]) -> tuple[str, dict[str, Any] | None]:
        """Our key among the trainer's states, and what a checkpoint had there.

        Of several callbacks each has a key of its own; theirs is the state of their prior.
        """
        ours = {key: value for key, value in states.items() if key.startswith(STATE)}
        free = {
            key: value for key, value in ours.items() if getattr(value, "home", 0) is not states
        }
        if len(ours) > 1:
            seals = self._wiring.seals()
            free = {k: v for k, v in free.items() if v["handle"]["priors"] == seals} or free
        for key, value in free.items():
            return key, dict(value.items())
        return STATE + (f"_{len(ours) + 1}" if ours else ""), None


def _log_before_reporters(callback: DriftCallback) -> None:
    """Move a callback before those that report to W&B, TensorBoard and the like.

    The trainer puts them before its user's callbacks, so that they would log without ours. It
    does not hand its list to callbacks; the list is looked for in the callers.
    """
    frame = sys._getframe(1)
    while frame is not None and not isinstance(
        frame.f_locals.get("self"), _callback.CallbackHandler
    ):
        frame = frame.f_back  # type: ignore[assignment]
    if frame is None:
        return
    handler = frame.f_locals["self"]
    if callback not in handler.callbacks:  # a callback within a callback
        return
    others = [one for one in handler.callbacks if one is not callback]
    first = sum(isinstance(one, _callback.DefaultFlowCallback) for one in others[:1])
    # A new list: the caller is walking over the old one.
    handler.callbacks = [*others[:first], callback, *others[first:]]


def _sample(model: Any) -> list[float] | None:
    """A few values of the weights that are trained; None where they are sharded."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    ends = [parameter.detach() for parameter in (*trained[:1], *trained[-1:])]
    if any(type(p) is not torch.Tensor or hasattr(p, "ds_id") or not p.numel() for p in ends):
        return None
    return [value for p in ends for value in p.flatten()[:_SAMPLE].double().tolist()]


def _check_weights(model: Any, saved: list[float] | None, step: int, *, is_strict: bool) -> bool:
    """Refuse to go on from weights that are not those of the checkpoint; False: not known.

    Trainer's loading leaves a model as it is, with no more than a line in the log, where names on
    the disk differ from those in memory: LLaVA and Qwen2.5-VL with transformers 5.23.
    """
    found = _sample(model)
    if saved is None or found is None:
        return False
    if found == saved:
        return True
    message = (
        f"this run resumes at step {step:,}, but the model does not have the weights of that step:"
        " the trainer has not loaded them."
    )
    remedy = (
        "Make the model from the checkpoint, then resume from the same:"
        " AutoModelForImageTextToText.from_pretrained(CHECKPOINT)"
    )
    if is_strict:
        raise VerificationError(message, remedy=remedy)
    warnings.warn(f"{message} {remedy}", stacklevel=2)
    return True
