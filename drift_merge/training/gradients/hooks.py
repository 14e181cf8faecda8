"""Calls a handle before every step of an optimizer, whoever wraps it."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from drift_merge.errors import RecipeError

Apply = Callable[[float | Tensor | None, Tensor | None], None]  # (loss scale, found_inf)
Undo = Callable[[], None]


def hook_optimizer(
    model: nn.Module,
    optimizer: Any,
    trained: Mapping[str, nn.Parameter],
    apply: Apply,
    skipped: Callable[[], None],
) -> Undo | None:
    """Call `apply` before every step of an optimizer.

    Args:
        model: as it is trained.
        optimizer: of torch, accelerate or DeepSpeed; None for none.
        trained: the parameters that will be biased, by name; the optimizer must hold them.
        apply: called with the loss scale that gradients still carry, and found_inf.
        skipped: called after a step that DeepSpeed did not take, since it found Inf.

    Returns:
        What undoes it; None where there is no optimizer to hook.

    Raises:
        RecipeError: it is no optimizer, or of another model.
    """
    if optimizer is None:
        return None
    from drift_merge.training.gradients import deepspeed

    if deepspeed.is_deepspeed(optimizer) or deepspeed.is_deepspeed(model):
        optimizer = deepspeed.find_optimizer(model, unwrap_accelerated(optimizer))
        if not isinstance(optimizer, torch.optim.Optimizer):
            _require_parameters(deepspeed.parameters_of(optimizer), trained)
            return deepspeed.hook_step(optimizer, lambda: apply(None, None), skipped)
    plain = unwrap(optimizer)
    _require_parameters([p for group in plain.param_groups for p in group["params"]], trained)

    def before_step(hooked: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        _refuse_closure(hooked, args, kwargs)
        # GradScaler leaves both to a fused optimizer whose gradients nobody has unscaled.
        apply(getattr(hooked, "grad_scale", None), getattr(hooked, "found_inf", None))

    # A compiled step() must call it, not trace it.
    hook = torch.compiler.disable(before_step)  # type: ignore[no-untyped-call]
    return plain.register_step_pre_hook(hook).remove


def unwrap_accelerated(optimizer: Any) -> Any:
    """The optimizer within accelerate's wrapper, or the optimizer itself."""
    while type(optimizer).__module__.split(".")[0] == "accelerate":
        optimizer = optimizer.optimizer
    return optimizer


def unwrap(optimizer: Any) -> torch.optim.Optimizer:
    """The torch optimizer within accelerate's.

    Raises:
        RecipeError: there is none.
    """
    plain = unwrap_accelerated(optimizer)
    if not isinstance(plain, torch.optim.Optimizer):
        raise RecipeError(
            f"optimizer is a {type(optimizer).__name__}; expected a torch.optim.Optimizer, an"
            " AcceleratedOptimizer or DeepSpeed's engine.",
            remedy="Pass optimizer=None and call handle.apply() before each step.",
        )
    return plain


def _require_parameters(
    parameters: Iterable[nn.Parameter], trained: Mapping[str, nn.Parameter]
) -> None:
    held = set(map(id, parameters))
    missing = [name for name, parameter in trained.items() if id(parameter) not in held]
    if missing:
        raise RecipeError(
            f"the optimizer does not hold {len(missing):,} of the {len(trained):,} parameters to be"
            f" biased, e.g. {missing[0]}.",
            remedy="Pass the optimizer that was made from this model's parameters, after the model"
            " was wrapped, or freeze what is not trained.",
        )


def _refuse_closure(optimizer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    given = [value for value in args if value is not optimizer]
    if any(map(callable, given)) or callable(kwargs.get("closure")):
        raise RecipeError(
            f"{type(optimizer).__name__}.step() got a closure: it computes the gradients after the"
            " hook has run, so that they would miss the bias.",
            remedy="Attach with optimizer=None and call handle.apply() at the end of the closure,"
            " after backward(); in Lightning use drift_merge.trainers.lightning.DriftCallback.",
        )


class Skips:
    """Counts skipped steps without waiting for the device within the step."""

    def __init__(self) -> None:
        self._total = 0
        self._pending: list[tuple[Tensor, Any]] = []  # found_inf on the host, event of its copy

    def add(self) -> None:
        """Count the step that has just been skipped."""
        self._total += 1

    def note(self, found_inf: Tensor | None) -> None:
        """Take down whether a fused optimizer will skip the next step: only the device knows."""
        if found_inf is None:
            return
        if found_inf.device.type == "cpu":
            self._pending.append((found_inf.detach().clone(), None))
            return
        host = torch.empty(found_inf.shape, dtype=found_inf.dtype, pin_memory=True)
        host.copy_(found_inf.detach(), non_blocking=True)
        event: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        self._pending.append((host, event))

    def total(self) -> int:
        """Steps skipped so far; at the next step the copies have long arrived."""
        for found, event in self._pending:
            if event is not None:
                event.synchronize()
            self._total += bool(found.any())
        self._pending.clear()
        return self._total
