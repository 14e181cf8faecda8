"""Biases gradients for a handle; set up at the first step, when gradients can be seen."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from drift_merge.errors import RecipeError
from drift_merge.training.deltas.beginning import beginning_now, saved_beginning
from drift_merge.training.deltas.files import DeltaSource, FileDeltas
from drift_merge.training.gradients.layout import GradientLayout, PlainLayout
from drift_merge.training.gradients.microbatch import HookLayout
from drift_merge.training.gradients.optimizer_state import pending_state_bytes
from drift_merge.training.gradients.takers import GradientTakers
from drift_merge.training.inject.build import BuiltPieces, build, partial_slots, units_by_optimizer
from drift_merge.training.inject.injector import Injector
from drift_merge.training.inject.pieces import DELTA_SQ, DOT
from drift_merge.training.inject.uses import DeltaUse
from drift_merge.training.lora.layers import at_beginning
from drift_merge.training.match.matching import Matching
from drift_merge.training.match.verdicts import Strictness, require_moved, require_weights
from drift_merge.training.match.weights import Comparison, WeightLayout, compare_weights
from drift_merge.training.placing import Placing
from drift_merge.training.settings import InjectionSettings
from drift_merge.training.units import Region, Unit


class GradientBias:
    """Everything that touches values: of gradients, deltas and weights."""

    def __init__(
        self,
        settings: InjectionSettings,
        matching: Matching,
        layout: GradientLayout,
        files: FileDeltas,
        optimizers: Sequence[torch.optim.Optimizer] = (),
    ) -> None:
        """Keep what `prepare` needs.

        Args:
            settings: the checked arguments of attach().
            matching: the units.
            layout: where gradients lie.
            files: of the priors.
            optimizers: if there are several, each one's step biases its own parameters.

        Raises:
            RecipeError: a tensor of the prior is spread over several optimizers.
        """
        self._settings, self._matching, self._layout = settings, matching, layout
        self._optimizers = tuple(optimizers)
        self._by_optimizer = (
            units_by_optimizer(matching, optimizers) if len(optimizers) > 1 else None
        )
        self._takers = GradientTakers()
        self._entries = files.priors[0].prior.tensors
        self._files = files
        self._delta_use = DeltaUse(settings.uses, is_placed=settings.until is not None)
        self._placing = Placing(files, settings.device)
        self._parts: list[BuiltPieces] = []
        self.hook_layouts: list[HookLayout] = []  # with when="microbatch", one for each parameter
        self.injectors: list[Injector] = []  # one, or one for each parameter
        self.start: Tensor | None = None  # theta_0 * delta, of all slots of all injectors

    @property
    def unit_groups(self) -> list[tuple[Unit, ...]]:
        """The units of each parameter, with when="microbatch"; else of each optimizer."""
        if self._settings.when == "step":
            return self._by_optimizer or [self._matching.units]
        groups: dict[str, list[Unit]] = {}
        for unit in self._matching.units:
            groups.setdefault(unit.parameter_name, []).append(unit)
        return [tuple(units) for units in groups.values()]

    @property
    def names(self) -> tuple[str, ...]:
        """Canonical names of all slots, in their order."""
        return tuple(n for units in self.unit_groups for n in dict.fromkeys(u.name for u in units))

    @property
    def is_ready(self) -> bool:
        """Whether `prepare` has run."""
        return bool(self.injectors)

    def prepare(self, *, start: Sequence[float] | None) -> None:
        """Make pieces and injectors; check the weights, unless the run has begun before.

        Where gradients are sharded all ranks call this together.

        Args:
            start: of a saved state; None in a new run.

        Raises:
            VerificationError: the weights are not those of the prior.
        """
        for units in self.unit_groups:
            layout = self._layout
            if self._settings.when == "microbatch":
                layout = HookLayout()
                self.hook_layouts.append(layout)
            matching = replace(self._matching, units=units)
            alphas, until = self._settings.alphas, self._settings.until
            parts = build(matching, self._entries, layout, alphas, self._delta_use)
            self._parts.append(parts)
            injector = Injector(parts.pieces, parts.slots, self._settings.function, until)
            injector.to(self._device(parts))
            self.injectors.append(injector)
        self._use(self._placing.host)
        if start is None:
            require_weights(self._compare(self._layout), **self._strictness)
        if self._delta_use.needs_weights:
            self._begin(is_resumed=start is not None)
        self.measure(start=start)

    def _begin(self, *, is_resumed: bool) -> None:
        """Take theta_0: as it is now, or that of a saved run."""
        if not is_resumed:
            self._delta_use.beginning = beginning_now(self._regions, self._values_layout)
            return
        opened = self._files.priors[0]
        found = saved_beginning(opened, self._regions, self._values_layout)
        require_weights(self._compare(found), **self._strictness)
        self._delta_use.beginning = found

    def require_loaded(self, steps: int) -> None:
        """Refuse to go on with a run whose weights are still those that it began with.

        Where gradients are sharded all ranks call this together.

        Args:
            steps: that the run has made.

        Raises:
            VerificationError: nothing has loaded the weights of its checkpoint.
        """
        if self._matching.adapted and not at_beginning(self._matching.adapted.values()):
            return  # PEFT's factors have moved; the weights below them never do
        require_moved(self._compare(self._layout), steps, **self._strictness)

    def _compare(self, layout: WeightLayout) -> Comparison:
        return compare_weights(self._matching.units, self._entries, layout)

    @property
    def _strictness(self) -> Strictness:
        # theta_0 + delta is the reasoner only where theta_0 is the prior's mllm.
        is_strict = self._settings.is_strict or self._delta_use.needs_weights
        return {"is_strict": is_strict, "command": self._settings.command}

    def measure(self, *, start: Sequence[float] | None) -> None:
        """Measure |delta|, and where the weights are; again after delta has changed."""
        found = [injector.positions() for injector in self.injectors]
        for injector, sums in zip(self.injectors, found, strict=True):
            self._set_norms(injector, sums[:, DELTA_SQ])
        measured = torch.cat([sums[:, DOT].cpu() for sums in found])
        self.set_start(measured.tolist() if start is None else start)

    def start_list(self) -> list[float] | None:
        """`start` as plain numbers, for a saved state."""
        return None if self.start is None else self.start.tolist()

    def set_start(self, start: Sequence[float]) -> None:
        """Measure distances from where a saved run began."""
        self.start = torch.tensor(start, dtype=torch.float64)
        counts = [len(injector.slots.names) for injector in self.injectors]
        for injector, own in zip(self.injectors, torch.split(self.start, counts), strict=True):
            injector.start = own.to(injector.device)

    def first_parameters(self) -> list[nn.Parameter | None]:
        """Of each optimizer a parameter whose gradient tells one step from the next."""
        held = ((piece for piece in parts.pieces if piece.numel) for parts in self._parts)
        return [next((piece.parameters[0] for piece in pieces), None) for pieces in held]

    def step(self, number: int, factor: float, scale: float | Tensor | None) -> None:
        """Bias all gradients; of one optimizer, where there are several.

        Args:
            number: of the optimizer.
            factor: the schedule's.
            scale: what gradients are still multiplied with; None: the layout knows.

        Raises:
            RecipeError: there is not a single gradient, or some were taken during backward.
        """
        self._layout.wait()
        scale = self._layout.loss_scale if scale is None else scale
        self._place()
        injector = self.injectors[number]
        injector.apply(factor, scale)
        if self._placing.moving is not None:
            self._placing.moving.end_step()
        held = [piece for piece in injector.pieces if piece.numel]
        if held and injector.missing.issuperset(held):
            raise RecipeError(
                f"none of the {len(held):,} tensors to be biased has a gradient.",
                remedy="Call apply() (or the hooked optimizer's step()) after backward() and"
                " before zero_grad(). Under DeepSpeed with accelerate, backward() takes the"
                " step too: attach with optimizer=. An optimizer that steps during backward()"
                " cannot be biased.",
            )
        if isinstance(self._layout, PlainLayout):
            self._takers.look([(p, p in injector.missing) for p in held])

    def step_one(self, number: int, factor: float) -> None:
        """Bias the gradient that the hook of one parameter was given."""
        self._place()
        self.injectors[number].apply(factor)

    def refresh(self, reasoner: str | Path | None, directory: str | Path | None) -> None:
        """Take delta anew, from the weights as they are now to the reasoner.

        Raises:
            RecipeError: there are several priors, or adapters.
        """
        from drift_merge.training.deltas.refresh import refreshed_deltas, require_refreshable

        require_refreshable(self._files.priors, self._files.weights, self._settings.control)
        held = refreshed_deltas(
            self._files.priors[0],
            self._regions,
            self._layout,
            reasoner,
            self._held_dtype,
            directory,
        )
        self._placing.leave(held)
        self._use(held)
        if self._delta_use.needs_weights:
            self._begin(is_resumed=False)
        self.measure(start=None)

    def release(self) -> None:
        """Let go of deltas and buffers."""
        self._placing.leave(self._files)
        self.injectors, self._parts, self.hook_layouts = [], [], []
        for opened in self._files.priors:
            opened.deltas.close()

    @property
    def _values_layout(self) -> GradientLayout:
        """Gives the weights; hooks of a parameter see whole ones."""
        return self._layout if self._settings.when == "step" else PlainLayout()

    @property
    def _regions(self) -> dict[Unit, Region]:
        """Every region of this rank, in the order of use."""
        return {unit: region for parts in self._parts for unit, region in parts.regions.items()}

    @property
    def _held_dtype(self) -> torch.dtype:
        """In which deltas are held outside the prior's files: as stored, unless compressed."""
        code = next(iter(self._entries.values()))["dtype"]
        dtypes = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16}
        return dtypes.get(code, torch.bfloat16)

    def _use(self, source: DeltaSource) -> None:
        for parts in self._parts:
            for piece in parts.pieces:
                piece.source = source

    def _device(self, parts: BuiltPieces) -> torch.device:
        """Where gradients lie; where the weights do as long as there are none."""
        found = [piece.device() for piece in parts.pieces]
        found += [u.parameter.device for u in self._matching.units if u.parameter is not None]
        return next((one for one in found if one is not None), torch.device("cpu"))

    @property
    def placement(self) -> str | None:
        """Where delta waits, what travels in a step, and why; None before the first step."""
        return None if self._placing.found is None else self._placing.found.text

    @contextmanager
    def from_host(self) -> Iterator[None]:
        """Read delta from the files for a while, whatever the ring or the other ranks do."""
        moving = self._placing.moving
        if moving is not None:
            self._use(self._placing.host)
        try:
            yield
        finally:
            if moving is not None:
                self._use(moving)

    def _place(self) -> None:
        """Bring delta to where gradients are: known for certain at the first step."""
        if self._placing.found is not None:
            return
        devices = [self._device(parts) for parts in self._parts]
        state = pending_state_bytes(self._optimizers, self._matching.trained, devices[0])
        pieces = [piece for parts in self._parts for piece in parts.pieces]
        placed = self._placing.choose(self._regions, pieces, devices[0], self._layout, state)
        for device, injector in zip(devices, self.injectors, strict=True):
            if device != injector.device or self._placing.cut is not None:
                injector.to(device, cut=self._placing.cut)
        self._use(placed.source)

    def _set_norms(self, injector: Injector, delta_sq: Tensor) -> None:
        names, units = injector.slots.names, self._matching.units
        adapted = {unit.name for unit in units if unit.is_adapted}
        is_adapted = torch.tensor([name in adapted for name in names], device=delta_sq.device)
        whole_sq = delta_sq
        is_partial = partial_slots(names, units, self._entries)
        if any(is_partial) and len(self._settings.seals) == 1:
            # None of NaN and Inf, which `build` has refused.
            prior = self._files.priors[0].prior
            recorded = [(prior.norm(name) or 0.0) ** 2 for name in names]
            whole = torch.tensor(recorded, dtype=torch.float64, device=delta_sq.device)
            mask = torch.tensor(is_partial, device=delta_sq.device)
            whole_sq = torch.where(mask, whole, delta_sq)
        is_anew = is_adapted if self._delta_use.is_stored else torch.ones_like(is_adapted)
        aim_sq = torch.where(is_adapted, whole_sq, delta_sq)
        injector.set_norms(delta_sq.masked_fill(is_anew, 0.0), whole_sq, aim_sq)
