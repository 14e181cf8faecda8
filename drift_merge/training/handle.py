"""The handle of a prior at work: apply, report, save and restore, refresh, remove."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from drift_merge.errors import RecipeError
from drift_merge.maths.injection import INJECTION_FORMULA, INJECTION_SIGN
from drift_merge.training.gradient_bias import GradientBias
from drift_merge.training.gradients.choose import require_current
from drift_merge.training.gradients.deepspeed import find_optimizer, hook_step, is_deepspeed
from drift_merge.training.gradients.hooks import StepCount, hook_stepper
from drift_merge.training.gradients.layout import GradientLayout, PlainLayout
from drift_merge.training.gradients.microbatch import hook_parameter
from drift_merge.training.gradients.rounding import warn_of_rounding
from drift_merge.training.guard import ModelWatch, StepGuard, claim, disclaim, watch_steps
from drift_merge.training.match.coverage import Coverage
from drift_merge.training.match.matching import Matching
from drift_merge.training.report import flatten, make_report
from drift_merge.training.settings import InjectionSettings, State, check_state, describe_state
from drift_merge.training.strength import Strength

_BIASED = "_drift_merge_biased"  # attribute of a gradient: by whom, and its version then


class Handle:
    """A prior at work in a training run; made by `attach`."""

    def __init__(
        self,
        settings: InjectionSettings,
        matching: Matching,
        biasing: GradientBias,
        steppers: Sequence[Any] = (),
    ) -> None:
        self._settings, self._matching, self._bias = settings, matching, biasing
        self._undo: list[Callable[[], None]] = []
        self._is_hooked = self._is_removed = False
        self._steppers = steppers
        self._counts = [StepCount() for _ in steppers or [None]]  # saved steps included
        self._start: list[float] | None = None  # theta_0 * delta by slot, for saved states
        self._refreshed_at: int | None = None
        self._parameters: list[nn.Parameter | None] = []  # whose gradient tells steps apart
        self._check_once: Callable[[], None] | None = None  # before the first step
        self._is_unproven = False  # a saved run's state is here; are its weights?
        self._guard: StepGuard | None = None
        self._strength = Strength(settings, matching, biasing, steppers)

    @property
    def coverage(self) -> Coverage:
        """What is biased, and what is not."""
        return self._matching.coverage

    @property
    def steps(self) -> int:
        """Optimizer steps that were biased and taken, from the beginning of the run."""
        return max(count.taken for count in self._counts)

    @property
    def num_biased(self) -> int:
        """How often gradients were biased, for steps that were skipped then too."""
        return max(count.biased for count in self._counts)

    def apply(
        self, *, scale: float | Tensor | None = None, found_inf: Tensor | None = None
    ) -> None:
        """Bias the gradients: after accumulation and reduction, before the step.

        Every step needs its own call: one without is an error.

        Args:
            scale: what the gradients are still multiplied with; None: they are unscaled.
            found_inf: other than 0 where GradScaler will skip the step: it is not counted then.

        Raises:
            RecipeError: the optimizer is hooked, so that its step does it; the handle was
                removed; these gradients are biased already; or there are none.
        """
        if self._settings.when == "microbatch":
            raise RecipeError(
                "with when='microbatch' every backward() biases its gradients already.",
                remedy="Do not call apply().",
            )
        if self._is_hooked:
            raise RecipeError(
                "the optimizer is hooked: its step() biases the gradients.",
                remedy="Do not call apply(), or attach with optimizer=None.",
            )
        self._step(0, None, scale, found_inf)

    def report(self) -> dict[str, Any]:
        """Coverage, and figures of the last step: overall, by module and by tensor.

        Waits for the device and reads all weights and deltas once. Where gradients are sharded
        all ranks must call it together.

        Returns:
            Plain data: rule, control, steps, coverage, missing_gradients, arrived,
            expected_distance; placement, where delta waits and why, None before the first step;
            and cosine, bias_ratio, coefficient, distance (see
            `training.report`), overall and by "modules" and "tensors"; None without a divisor.
        """
        self._refuse_removed()
        if not self._bias.is_ready:
            self._prepare()
        with self._bias.from_host():
            found = make_report(
                *(self._bias.injectors, self.coverage, self._bias.start),
                rule=self._settings.rule,
                control=self._settings.control,
                steps=self.steps,
                expected_distance=self._strength.expected(),
            )
        return found | {"placement": self._bias.placement}

    def metrics(self) -> dict[str, float]:
        """The figures of `report()` that a trainer logs, flat: "drift/cosine", "drift/attn/..."."""
        factor = self._settings.factor(max(0, self.steps - 1))
        alphas = {module: alpha * factor for module, alpha in self._settings.alphas.items()}
        return flatten(self.report(), alphas)

    def state_dict(self) -> State:
        """What a resumed run needs, as plain data that JSON can hold.

        Waits for no device, unless GradScaler lets a fused optimizer skip steps.
        """
        return describe_state(
            self._settings,
            self._bias.names,
            steps=self.steps,
            start=self._start,
            refreshed_at=self._refreshed_at,
        )

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where a saved run stopped.

        Raises:
            RecipeError: the state is of another prior (both fingerprints are named) or
                selection; with strict, also of other settings.
        """
        check_state(state, self._settings, self._bias.names)
        for count in self._counts:
            count.resume(int(state["steps"]))
        self._start = state["start"]
        if self._start is not None and self._bias.is_ready:
            self._bias.set_start(self._start)
        self._is_unproven = True

    def trust_weights(self) -> None:
        """The caller knows that the weights are those of the resumed step: do not look."""
        self._is_unproven = False

    def refresh(
        self, reasoner: str | Path | None = None, *, directory: str | Path | None = None
    ) -> None:
        """Recompute delta = theta_reasoner - theta against the weights as they are now.

        The new delta lies in a temporary file that vanishes with the handle. Distances count
        from here. Where gradients are sharded all ranks must call it together.

        Args:
            reasoner: checkpoint; None for the one that the prior names.
            directory: for the temporary file, as large as this rank's part of the prior; None
                for Python's (TMPDIR).

        Raises:
            RecipeError: there are several priors, or adapters; or the handle was removed.
            OutputError: there is no room for the temporary file; training can go on as before.
            SourceError, CheckpointError, AlignmentError: as for computing a prior.
        """
        self._refuse_removed()
        if not self._bias.is_ready:
            self._prepare()
        self._bias.refresh(reasoner, directory)
        self._start, self._refreshed_at = self._bias.start_list(), self.steps

    def remove(self) -> None:
        """Go back to plain training: no hook is left. May be called again."""
        while self._undo:
            self._undo.pop()()
        disclaim(self, self._matching.trained)
        self._bias.release()
        self._is_removed, self._is_hooked = True, False

    def begin(self, model: nn.Module, layout: GradientLayout) -> None:
        """Hook in, and look at the weights unless they are sharded; `attach` calls it once."""
        steppers, trained = self._steppers, self._matching.trained
        held = claim(self, trained, self._settings.seals)
        if isinstance(layout, PlainLayout):
            self._prepare()
        self._check_once = partial(require_current, model, self._matching.units, layout)
        is_step = self._settings.when == "step"
        watch = ModelWatch(model, self._matching)
        self._guard = StepGuard(trained, steppers, watch.check, counts_gaps=is_step)
        self._guard.outlive(self, held)
        self._guard.first_seen = partial(warn_of_rounding, trained=trained)
        self._undo.append(watch_steps(self._guard.after_step))
        act = self._step if is_step else self._count_step
        for number, stepper in enumerate(steppers):
            skipped, after = self._counts[number].add_skipped, self._guard.after_step
            hook = hook_stepper(
                stepper, partial(act, number, stepper), skipped=skipped, after=after
            )
            self._undo.append(hook)
        self._is_hooked = bool(steppers)
        warn_of_rounding(*steppers, trained=trained)
        if not steppers and is_deepspeed(model):
            self._watch_deepspeed(model)
        if not is_step:
            self._hook_parameters()

    def _watch_deepspeed(self, model: nn.Module) -> None:
        """See the steps that DeepSpeed takes, though apply() is called by hand."""
        guard, optimizer = self._guard, find_optimizer(model)
        assert guard is not None
        if not isinstance(optimizer, torch.optim.Optimizer):
            after = partial(guard.after_step, optimizer)
            undo = hook_step(optimizer, lambda: None, self._counts[0].add_skipped, after)
            self._undo.append(undo)

    def _prepare(self) -> None:
        self._bias.prepare(start=self._start)
        self._start = self._bias.start_list()
        self._parameters = self._bias.first_parameters()

    def _hook_parameters(self) -> None:
        if not self._is_hooked and self._settings.schedule != "constant":
            raise RecipeError(
                f"when='microbatch' with schedule {self._settings.schedule!r} must know the steps.",
                remedy="Pass the optimizer: attach(..., optimizer=optimizer).",
            )
        for number, units in enumerate(self._bias.unit_groups):
            parameter = units[0].parameter
            assert parameter is not None

            def bias(number: int = number) -> None:
                self._bias.step_one(number, self._settings.factor(self.steps))

            layout = self._bias.hook_layouts[number]
            self._undo.append(hook_parameter(parameter, layout, bias).remove)

    def _step(
        self,
        number: int,
        stepper: Any,
        scale: float | Tensor | None,
        found_inf: Tensor | None,
    ) -> None:
        """Bias the gradients of one optimizer; of all, where there is one or apply() is called."""
        self._refuse_removed()
        if self._check_once is not None:
            self._check_once()
            self._check_once = None
        if not self._bias.is_ready:
            self._prepare()
        if self._is_unproven and self.steps:
            self._bias.require_loaded(self.steps)
        self._is_unproven = False
        assert self._guard is not None
        self._guard.before_bias()
        self._refuse_repetition(number)
        self._bias.step(number, self._settings.factor(self._counts[number].taken), scale)
        self._count_step(number, stepper, scale, found_inf)
        gradient = self._gradient(number)
        if gradient is not None:
            # Not a weakref, with which torch refuses to move the parameters of FSDP2.
            setattr(gradient, _BIASED, (id(self), gradient._version))

    def _count_step(
        self,
        number: int,
        stepper: Any,
        scale: float | Tensor | None,
        found_inf: Tensor | None,
    ) -> None:
        self._counts[number].add(found_inf)
        if self._guard is not None:
            self._guard.note_bias(stepper)
        if number == 0:
            self._strength.look()

    def _gradient(self, number: int) -> Tensor | None:
        parameter = self._parameters[number]
        return None if parameter is None else parameter.grad

    def _refuse_repetition(self, number: int) -> None:
        """Refuse gradients that nobody has touched since we biased them."""
        gradient = self._gradient(number)
        if gradient is None:
            return
        if getattr(gradient, _BIASED, None) == (id(self), gradient._version):
            raise RecipeError(
                "these gradients are biased already: there was no backward() since.",
                remedy="Call apply() once per optimizer step, and zero_grad() after it.",
            )

    def _refuse_removed(self) -> None:
        if self._is_removed:
            remedy = "Attach anew: attach(model, prior)."
            raise RecipeError("this handle was removed.", remedy=remedy)

    def describe(self) -> str:
        """The rule, its formula and sign, alpha, coverage and what to expect, for a log."""
        settings = self._settings
        alphas = ", ".join(f"{module} {alpha:g}" for module, alpha in settings.alphas.items())
        more = {"until": settings.until, "control": settings.control}
        options = "".join(f" {key}={value}" for key, value in more.items() if value is not None)
        return (
            f"rule={settings.rule} alpha=({alphas}) when={settings.when}{options}:"
            f" {INJECTION_FORMULA}; {INJECTION_SIGN}; {self.coverage.text()}"
            f"{self._strength.text()}"
        )

    def __repr__(self) -> str:
        return f"<drift_merge.Handle {self.describe()}>"
