"""Calls a handle before every step of the optimizers, whoever wraps them."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from drift_merge.errors import RecipeError

Apply = Callable[[float | Tensor | None, Tensor | None], None]  # (loss scale, found_inf)
Undo = Callable[[], None]


def steppers_of(
    model: nn.Module, optimizer: Any, trained: Mapping[str, nn.Parameter]
) -> tuple[Any, ...]:
    """What takes the steps: torch's optimizers, or the one optimizer of DeepSpeed.

    Args:
        model: as it is trained.
        optimizer: of torch, accelerate or DeepSpeed, several in a list or in a wrapper; or None.
        trained: the parameters that will be biased, by name; together they must hold them.

    Returns:
        Nothing for None.

    Raises:
        RecipeError: it is no optimizer, or of another model.
    """
    if optimizer is None:
        return ()
    from drift_merge.training.gradients import deepspeed

    if deepspeed.is_deepspeed(optimizer) or deepspeed.is_deepspeed(model):
        optimizer = deepspeed.find_optimizer(model, unwrap_accelerated(optimizer))
        if not isinstance(optimizer, torch.optim.Optimizer):
            _require_parameters(deepspeed.parameters_of(optimizer), trained)
            return (optimizer,)
    found = list({id(one): one for one in _flatten(optimizer)}.values())
    if not found:
        raise RecipeError(
            "the list of optimizers is empty.",
            remedy="Pass those that step the model, or optimizer=None and call handle.apply().",
        )
    _require_parameters((p for one in found for p in parameters_of(one)), trained)
    ours = {id(parameter) for parameter in trained.values()}
    return tuple(one for one in found if not ours.isdisjoint(map(id, parameters_of(one))))


def hook_stepper(
    stepper: Any, apply: Apply, *, skipped: Callable[[], None], after: Callable[[Any], None]
) -> Undo:
    """Call `apply` before every step of an optimizer.

    Args:
        stepper: one of `steppers_of`.
        apply: called with the loss scale that gradients still carry, and found_inf.
        skipped: called after a step that DeepSpeed did not take, since it found Inf.
        after: called with the stepper after a step of DeepSpeed's. (Of torch's tells a hook of
            all optimizers.)
    """
    from drift_merge.training.gradients import deepspeed

    if not isinstance(stepper, torch.optim.Optimizer):
        return deepspeed.hook_step(
            stepper, lambda: apply(None, None), skipped, lambda: after(stepper)
        )

    def before_step(hooked: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        _refuse_closure(hooked, args, kwargs)
        if not is_initialization(hooked):
            # GradScaler leaves both to a fused optimizer whose gradients nobody has unscaled.
            apply(getattr(hooked, "grad_scale", None), getattr(hooked, "found_inf", None))

    # A compiled step() must call it, not trace it.
    hook = torch.compiler.disable(before_step)  # type: ignore[no-untyped-call]
    return stepper.register_step_pre_hook(hook).remove


def parameters_of(optimizer: torch.optim.Optimizer) -> Iterator[nn.Parameter]:
    """The parameters of all groups of an optimizer."""
    return (p for group in optimizer.param_groups for p in group["params"])


def is_idle(optimizer: torch.optim.Optimizer) -> bool:
    """Whether every learning rate of an optimizer is 0, seen without waiting for a device."""
    rates = [group.get("lr") for group in optimizer.param_groups]
    return all(
        rate is not None
        and (not isinstance(rate, Tensor) or rate.device.type == "cpu")
        and float(rate) == 0.0
        for rate in rates
    )


def is_initialization(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a step only makes the optimizer's state: at rate 0, of gradients that are all 0.

    So torch.distributed.checkpoint does in get_optimizer_state_dict and set_optimizer_state_dict.
    The first step of a warm-up is at rate 0 as well, and has gradients. Where these are sharded
    all ranks come to the same answer.
    """
    return not optimizer.state and is_idle(optimizer) and not _any_gradient(optimizer)


def _any_gradient(optimizer: torch.optim.Optimizer) -> bool:
    from drift_merge.training.gradients.sharded import is_dtensor

    found, meshes = False, {}
    for parameter in parameters_of(optimizer):
        gradient: Any = parameter.grad
        if is_dtensor(parameter):
            mesh: Any = parameter.device_mesh  # type: ignore[attr-defined]
            meshes[id(mesh)] = mesh
        if gradient is not None and not found:
            local = gradient.to_local() if is_dtensor(gradient) else gradient
            found = bool(local.any())
    for mesh in meshes.values():
        flag = torch.tensor(int(found), device=mesh.device_type)
        for dim in range(mesh.ndim):
            torch.distributed.all_reduce(
                flag, op=torch.distributed.ReduceOp.MAX, group=mesh.get_group(dim)
            )
        found = bool(flag)
    return found


def unwrap_accelerated(optimizer: Any) -> Any:
    """The optimizer within accelerate's wrapper, or the optimizer itself."""
    while type(optimizer).__module__.split(".")[0] == "accelerate":
        optimizer = optimizer.optimizer
    return optimizer


def _flatten(optimizer: Any) -> Iterator[torch.optim.Optimizer]:
    """The torch optimizers in a list or a wrapper.

    Raises:
        RecipeError: there is none.
    """
    plain = unwrap_accelerated(optimizer)
    if isinstance(plain, list | tuple):
        yield from (found for one in plain for found in _flatten(one))
        return
    if isinstance(plain, torch.optim.Optimizer) and hasattr(plain, "param_groups"):
        yield plain
        return
    held = list(_held(plain))  # such as VeOmni's MultiOptimizer, which has no groups of its own
    if not held:
        raise RecipeError(
            f"optimizer is a {type(optimizer).__name__}; expected a torch.optim.Optimizer, an"
            " AcceleratedOptimizer, DeepSpeed's engine, or a list of optimizers.",
            remedy="Pass optimizer=None and call handle.apply() before each step.",
        )
    yield from (found for one in held for found in _flatten(one))


def _held(wrapper: Any) -> Iterator[torch.optim.Optimizer]:
    """Optimizers that are attributes of an object, or in a list or dict that is one."""
    for value in getattr(wrapper, "__dict__", {}).values():
        many = value.values() if isinstance(value, Mapping) else value
        many = many if isinstance(many, Iterable) else [many]
        yield from (one for one in many if isinstance(one, torch.optim.Optimizer))


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
            " was wrapped; all of them if there are several: optimizer=[first, second]. Or freeze"
            " what is not trained.",
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


class StepCount:
    """Counts the steps of an optimizer without waiting for the device within a step."""

    def __init__(self) -> None:
        self.biased = 0  # steps that were begun with biased gradients, skipped ones included
        self._skipped = 0
        self._pending: list[tuple[Tensor, Any]] = []  # found_inf on the host, event of its copy

    def add_skipped(self) -> None:
        """Count the step that has just been skipped."""
        self._skipped += 1

    def add(self, found_inf: Tensor | None) -> None:
        """Count a step; only the device knows whether found_inf will have it skipped."""
        self.biased += 1
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

    @property
    def taken(self) -> int:
        """Steps that were not skipped; at the next step the copies have long arrived."""
        for found, event in self._pending:
            if event is not None:
                event.synchronize()
            self._skipped += bool(found.any())
        self._pending.clear()
        return self.biased - self._skipped

    def resume(self, steps: int) -> None:
        """Go on from `steps` steps that were taken."""
        self.biased += steps - self.taken
