"""Holds a handle to its promise: every step of an optimizer was biased, or there is an error.

Watches every optimizer of torch in the process (a hook of torch's own), the parameters that were
frozen when the handle was attached, the active adapters, and who else biases the same parameters.
A step costs a few microseconds; nothing here waits for a device.
"""

import gc
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from drift_merge.errors import RecipeError
from drift_merge.training.gradients.hooks import is_idle, parameters_of
from drift_merge.training.lora.layers import active_adapters, is_lora
from drift_merge.training.match.matching import Matching

_CLAIMS = "_drift_merge_claims"  # attribute of a parameter: the handles that bias it
_METHOD = "_drift_merge_method"  # attribute of a hook: weakly, whose it is
_FEW = 3

GAPS = {
    "other": (
        "a {kind} that the handle does not know has stepped {name}: that step was made without the"
        " bias.",
        "If the optimizer was made anew after attach(): handle.remove(), then attach(...,"
        " optimizer=optimizer) with the new one. If there are several, pass all:"
        " optimizer=[first, second]. An optimizer that steps during backward() cannot be biased.",
    ),
    "apply": (
        "{kind}.step() was called without handle.apply() before it ({name}): that step was made"
        " without the bias.",
        "Call handle.apply() before every step, after unscaling; or let the optimizer be hooked:"
        " attach(..., optimizer=optimizer).",
    ),
    "dropped": (
        "the handle of the prior was dropped (perhaps with its optimizer), and {kind} has stepped"
        " {name}: that step was made without the bias.",
        "Keep the handle as long as you train. To train this model without the prior:"
        " attach(model, prior).remove()",
    ),
}


def _nothing(*_: Any) -> None:
    """In place of what belonged to a dropped handle."""


class StepGuard:
    """Sees the steps of all optimizers; a step of a biased parameter without bias is an error."""

    def __init__(
        self,
        trained: Mapping[str, nn.Parameter],
        steppers: Sequence[Any],
        check: Callable[[], None],
        *,
        counts_gaps: bool = True,
    ) -> None:
        """Keep what must be biased.

        Args:
            trained: the parameters that are biased, by name.
            steppers: that are hooked; empty where `apply()` is called by hand.
            check: of the model, called before every bias.
            counts_gaps: False where hooks of the parameters bias, whoever steps; then `check` is
                called after a step.
        """
        self._names = {id(parameter): name for name, parameter in trained.items()}
        self._hooked = {id(stepper) for stepper in steppers}
        self._check, self._counts_gaps = check, counts_gaps
        self._known: weakref.WeakKeyDictionary[Any, tuple[int, str | None]]
        self._known = weakref.WeakKeyDictionary()
        self._inside: set[int] = set()  # hooked optimizers whose step is under way
        self._done: set[int] | None = None  # optimizers that have stepped since apply()
        self._is_orphan = False
        self.first_seen: Callable[[torch.optim.Optimizer], None] = _nothing

    def outlive(self, owner: Any, held: "_Claim") -> None:
        """Live as long as the parameters; know when the handle is dropped without remove()."""
        held.guard = self
        weakref.finalize(owner, self._orphan).atexit = False

    def _orphan(self) -> None:
        self._is_orphan = True  # and holds no parameter any more
        self._known.clear()
        self._check = self.first_seen = _nothing

    def before_bias(self) -> None:
        """Look at the model, before a step is made.

        Raises:
            RecipeError: what `check` raises.
        """
        self._check()

    def note_bias(self, stepper: Any = None) -> None:
        """The gradients were biased: within the step of a hooked optimizer, or by apply()."""
        if stepper is None:
            self._done = set()
        else:
            self._inside.add(id(stepper))

    def after_step(self, stepper: Any) -> None:
        """A step was made.

        Raises:
            RecipeError: without the bias; or what `check` raises.
        """
        if id(stepper) in self._hooked:
            self._inside.discard(id(stepper))
            return
        name = self._name_of(stepper)
        if name is None or self._inside:  # another model's; or one within a hooked container
            return
        if self._counts_gaps:
            self._require_bias(stepper, name)
        else:
            self._check()

    def _require_bias(self, stepper: Any, name: str) -> None:
        reason = "dropped" if self._is_orphan else "other" if self._hooked else "apply"
        if reason == "apply" and self._done is not None and id(stepper) not in self._done:
            self._done.add(id(stepper))
            return
        # A step at rate 0 changes nothing: so states are initialized by distributed checkpoints.
        if isinstance(stepper, torch.optim.Optimizer) and is_idle(stepper):
            return
        message, remedy = GAPS[reason]
        raise RecipeError(message.format(kind=type(stepper).__name__, name=name), remedy=remedy)

    def _is_ours(self, parameter: nn.Parameter) -> bool:
        """Whether an id is that of our parameter: a dropped handle's may live on as another's."""
        claims: tuple[_Claim, ...] = getattr(parameter, _CLAIMS, ())
        return not self._is_orphan or any(one.guard is self for one in claims)

    def _name_of(self, stepper: Any) -> str | None:
        """The first of our parameters that an optimizer holds."""
        if not isinstance(stepper, torch.optim.Optimizer):
            return "its parameters"  # DeepSpeed's, which was found from the model
        size = sum(len(group["params"]) for group in stepper.param_groups)
        known = self._known.get(stepper)
        if known is None or known[0] != size:
            names = (self._names.get(id(p)) for p in parameters_of(stepper) if self._is_ours(p))
            known = (size, next((name for name in names if name is not None), None))
            self._known[stepper] = known
            if known[1] is not None:
                self.first_seen(stepper)
        return known[1]


def watch_steps(after_step: Callable[[Any], None]) -> Callable[[], None]:
    """Call a bound method after every step of any optimizer of torch, as long as its object lives.

    Returns:
        What ends it.
    """
    method = weakref.WeakMethod(after_step)  # torch's table of hooks must keep no model alive

    def hook(optimizer: Any, args: Any, kwargs: Any) -> None:
        found = method()
        if found is not None:
            found(optimizer)

    # A compiled step() must call it, not trace it.
    untraced: Any = torch.compiler.disable(hook)  # type: ignore[no-untyped-call]
    setattr(untraced, _METHOD, method)
    registered = register_optimizer_step_post_hook(untraced)
    _forget_dead(registered.hooks_dict_ref())
    return registered.remove


def _forget_dead(table: Any) -> None:
    """Take out hooks whose objects are gone: not when they go, which may be amid a step."""
    for key, other in list(table.items()):
        method = getattr(other, _METHOD, None)
        if method is not None and method() is None:
            del table[key]


class ModelWatch:
    """Notices that more of a model is trained than when the handle was attached."""

    def __init__(self, model: nn.Module, matching: Matching) -> None:
        named = dict(model.named_parameters(remove_duplicate=False))
        frozen = {name: named[name] for name in matching.coverage.frozen if name in named}
        selected = {name.partition(".base_layer")[0] for name in (*frozen, *matching.adapted)}
        self._layers: list[tuple[str, Any, tuple[str, ...]]] = []
        for path, layer in model.named_modules():
            if path in selected and is_lora(layer):  # with or without an active adapter
                self._layers.append((path, layer, active_adapters(layer)))
                idle = layer.named_parameters(prefix=path)
                frozen |= {name: p for name, p in idle if not p.requires_grad}
        self._frozen = tuple(frozen.items())

    def check(self) -> None:
        """Look again.

        Raises:
            RecipeError: a parameter was unfrozen, or another adapter activated.
        """
        thawed = [name for name, parameter in self._frozen if parameter.requires_grad]
        turned = [name for name, layer, active in self._layers if active_adapters(layer) != active]
        if turned:
            raise RecipeError(
                f"the active adapters of {_some(turned)} were changed after attach(): those that"
                " are trained now have no bias.",
                remedy="Activate the adapters first, then attach; after a change: handle.remove(),"
                " then attach(..., state=handle.state_dict()).",
            )
        if thawed:
            raise RecipeError(
                f"{_some(thawed)} were frozen when the prior was attached and are trained now,"
                " without a bias.",
                remedy="Unfreeze first, then attach; where training is unfrozen in stages:"
                " handle.remove(), then attach(...) anew at each stage, with strict=False.",
            )


class _Claim:
    """Who biases a parameter with which priors; a copy or a pickle of the parameter has none."""

    def __init__(self, owner: Any = None, seals: Iterable[str] = ()) -> None:
        self._owner = None if owner is None else weakref.ref(owner)
        self.seals = frozenset(seals)
        # A handle that was dropped without remove(), perhaps with its optimizer, biases no more,
        # but what was promised stands: the guard lives on with the parameters.
        self.guard: StepGuard | None = None

    @property
    def owner(self) -> Any:
        return None if self._owner is None else self._owner()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()


def claim(owner: Any, trained: Mapping[str, nn.Parameter], seals: Sequence[str]) -> _Claim:
    """Take parameters for a handle; `disclaim` gives them back.

    Returns:
        What the parameters hold; give it the guard.

    Raises:
        RecipeError: a live handle biases one of them with one of the same priors.
    """
    if _claimed(owner, trained, seals) is not None:
        gc.collect()  # a handle that nobody holds any more claims nothing
    name = _claimed(owner, trained, seals)
    if name is not None:
        raise RecipeError(
            f"{name} is biased by this prior already: a second handle would double it.",
            remedy="Call attach() once, or use a trainer's callback, not both, and list the"
            " callback once. To attach anew, first: handle.remove()",
        )
    made = _Claim(owner, seals)
    for parameter in trained.values():
        setattr(parameter, _CLAIMS, (*_others(parameter, owner), made))
    return made


def _claimed(owner: Any, trained: Mapping[str, nn.Parameter], seals: Sequence[str]) -> str | None:
    """The first parameter that another handle biases with one of these priors."""
    for name, parameter in trained.items():
        if any(other.seals & set(seals) for other in _others(parameter, owner)):
            return name
    return None


def disclaim(owner: Any, trained: Mapping[str, nn.Parameter]) -> None:
    """Give up the claims of a handle."""
    for parameter in trained.values():
        others = _others(parameter, owner)
        if others:
            setattr(parameter, _CLAIMS, others)
        elif hasattr(parameter, _CLAIMS):
            delattr(parameter, _CLAIMS)


def _others(parameter: nn.Parameter, owner: Any) -> tuple[_Claim, ...]:
    claims: tuple[_Claim, ...] = getattr(parameter, _CLAIMS, ())
    return tuple(one for one in claims if one.owner is not None and one.owner is not owner)


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _FEW:,} more" if len(names) > _FEW else ""
    return ", ".join(names[:_FEW]) + more
