"""The handle of a prior at work: apply, report, save and restore, refresh, remove."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from drift_merge.errors import RecipeError
from drift_merge.maths.injection import INJECTION_FORMULA, INJECTION_SIGN
from drift_merge.training.gradient_bias import GradientBias
from drift_merge.training.gradients.choose import require_current
from drift_merge.training.gradients.hooks import Skips, hook_optimizer
from drift_merge.training.gradients.layout import GradientLayout, PlainLayout
from drift_merge.training.gradients.microbatch import hook_parameter
from drift_merge.training.match.coverage import Coverage
from drift_merge.training.match.matching import Matching
from drift_merge.training.report import flatten, make_report
from drift_merge.training.settings import InjectionSettings, State, check_state, describe_state

_BIASED = "_drift_merge_biased"  # attribute of a gradient: by whom, and its version then


class Handle:
    """A prior at work in a training run; made by `attach`."""

    def __init__(
        self, settings: InjectionSettings, matching: Matching, biasing: GradientBias
    ) -> None:
        self._settings, self._matching, self._bias = settings, matching, biasing
        self._undo: list[Callable[[], None]] = []
        self._is_hooked = self._is_removed = False
        self._count = 0  # steps that were biased, those of the saved state included
        self._skips = Skips()
        self._start: list[float] | None = None  # theta_0 * delta by slot, for saved states
        self._refreshed_at: int | None = None
        self._parameter: nn.Parameter | None = None  # whose gradient that is
        self._check_once: Callable[[], None] | None = None  # before the first step

    @property
    def coverage(self) -> Coverage:
        """What is biased, and what is not."""
        return self._matching.coverage

    @property
    def steps(self) -> int:
        """Optimizer steps that were biased, from the beginning of the run."""
        return self._count - self._skips.total()

    def apply(self) -> None:
        """Bias the gradients: after accumulation, reduction and unscaling, before the step.

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
        self._step(None, None)

    def report(self) -> dict[str, Any]:
        """Coverage, and figures of the last step: overall, by module and by tensor.

        Waits for the device and reads all weights and deltas once. Where gradients are sharded
        all ranks must call it together.

        Returns:
            Plain data: rule, steps, coverage, missing_gradients; and cosine, bias_ratio,
            coefficient, distance (see `training.report`), overall and under "modules" and
            "tensors". A figure is None where there is nothing to divide by, as before the
            first step.
        """
        self._refuse_removed()
        if not self._bias.is_ready:
            self._prepare()
        return make_report(
            self._bias.injectors,
            self.coverage,
            self._bias.start,
            rule=self._settings.rule,
            steps=self.steps,
        )

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
        self._count = int(state["steps"]) + self._skips.total()
        self._start = state["start"]
        if self._start is not None and self._bias.is_ready:
            self._bias.set_start(self._start)

    def refresh(self, reasoner: str | Path | None = None) -> None:
        """Recompute delta = theta_reasoner - theta against the weights as they are now.

        The new delta lies in a temporary file that vanishes with the handle. Distances count
        from here. Where gradients are sharded all ranks must call it together.

        Args:
            reasoner: checkpoint; None for the one that the prior names.

        Raises:
            RecipeError: there are several priors, or adapters; or the handle was removed.
            SourceError, CheckpointError, AlignmentError: as for computing a prior.
        """
        self._refuse_removed()
        if not self._bias.is_ready:
            self._prepare()
        self._bias.refresh(reasoner)
        self._start, self._refreshed_at = self._bias.start_list(), self.steps

    def remove(self) -> None:
        """Go back to plain training: no hook is left. May be called again."""
        for undo in reversed(self._undo):
            undo()
        self._undo.clear()
        self._bias.release()
        self._is_removed, self._is_hooked = True, False

    def begin(self, model: nn.Module, optimizer: Any, layout: GradientLayout) -> None:
        """Hook in, and look at the weights unless they are sharded; `attach` calls it once."""
        if isinstance(layout, PlainLayout):
            self._prepare()
        self._check_once = lambda: require_current(model, self._matching.units, layout)
        act = self._step if self._settings.when == "step" else self._count_step
        undo = hook_optimizer(model, optimizer, self._matching.trained, act, self._skips.add)
        if undo is not None:
            self._undo.append(undo)
            self._is_hooked = True
        if self._settings.when == "microbatch":
            self._hook_parameters()

    def _prepare(self) -> None:
        self._bias.prepare(start=self._start)
        self._start = self._bias.start_list()
        self._parameter = self._bias.first_parameter()

    def _hook_parameters(self) -> None:
        if not self._is_hooked and self._settings.schedule != "constant":
            raise RecipeError(
                f"when='microbatch' with schedule {self._settings.schedule!r} must know the steps.",
                remedy="Pass the optimizer: attach(..., optimizer=optimizer).",
            )
        for number, units in enumerate(self._bias.parameters):
            parameter = units[0].parameter
            assert parameter is not None

            def bias(number: int = number) -> None:
                self._bias.step_one(number, self._settings.factor(self.steps))

            layout = self._bias.hook_layouts[number]
            self._undo.append(hook_parameter(parameter, layout, bias).remove)

    def _step(self, scale: float | Tensor | None, found_inf: Tensor | None) -> None:
        self._refuse_removed()
        if self._check_once is not None:
            self._check_once()
            self._check_once = None
        if not self._bias.is_ready:
            self._prepare()
        self._refuse_repetition()
        self._bias.step(self._settings.factor(self.steps), scale)
        self._count_step(scale, found_inf)
        gradient = None if self._parameter is None else self._parameter.grad
        if gradient is not None:
            # Not a weakref, with which torch refuses to move the parameters of FSDP2.
            setattr(gradient, _BIASED, (id(self), gradient._version))

    def _count_step(self, scale: float | Tensor | None, found_inf: Tensor | None) -> None:
        self._count += 1
        self._skips.note(found_inf)

    def _refuse_repetition(self) -> None:
        """Refuse gradients that nobody has touched since we biased them."""
        gradient = None if self._parameter is None else self._parameter.grad
        if gradient is None:
            return
        if getattr(gradient, _BIASED, None) == (id(self), gradient._version):
            raise RecipeError(
                "these gradients are biased already: there was no backward() since.",
                remedy="Call apply() once per optimizer step, and zero_grad() after it.",
            )

    def _refuse_removed(self) -> None:
        if self._is_removed:
            raise RecipeError(
                "this handle was removed.", remedy="Attach the prior again: attach(model, prior)."
            )

    def describe(self) -> str:
        """The rule, its formula and sign, alpha and coverage, for a log."""
        settings = self._settings
        alphas = ", ".join(f"{module} {alpha:g}" for module, alpha in settings.alphas.items())
        return (
            f"rule={settings.rule} alpha=({alphas}) when={settings.when}: {INJECTION_FORMULA};"
            f" {INJECTION_SIGN}; {self.coverage.text()}"
        )

    def __repr__(self) -> str:
        return f"<drift_merge.Handle {self.describe()}>"
