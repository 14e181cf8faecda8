"""Every step of an optimizer was biased, or there is an error that says why."""

from types import SimpleNamespace

import pytest
import torch

import drift_merge
from drift_merge.errors import RecipeError
from drift_merge.training.guard import ModelWatch
from tests.training.lora.layers import ToyLora
from tests.training.naive import biased, tolerance
from tests.training.toys import RATE, loss_of, selected, sgd, step


def test_an_optimizer_that_is_made_anew_is_noticed_at_its_first_step(toy):
    model = toy.model()
    first = sgd(model.parameters())
    handle = drift_merge.attach(model, toy.prior, optimizer=first)
    step(model, first)
    with pytest.raises(RecipeError, match="SGD that the handle does not know") as raised:
        step(model, sgd(model.parameters()))
    assert "made anew" in raised.value.remedy
    assert handle.steps == 1
    step(toy.model(), sgd(toy.model().parameters()))  # another model's is of no concern
    handle.remove()
    step(model, sgd(model.parameters()))


def test_an_optimizer_of_other_parameters_beside_is_of_no_concern(toy):
    model = toy.model()
    own = sgd(selected(model).values())
    rest = sgd([p for p in model.parameters() if not any(p is q for q in selected(model).values())])
    handle = drift_merge.attach(model, toy.prior, optimizer=own)
    step(model, own, rest)
    assert handle.steps == 1


def test_a_step_without_apply_is_an_error(toy):
    model = toy.model()
    optimizer = sgd(model.parameters())
    handle = drift_merge.attach(model, toy.prior)
    with pytest.raises(RecipeError, match=r"without handle\.apply\(\)"):
        step(model, optimizer)
    optimizer.zero_grad()
    loss_of(model).backward()
    handle.apply()
    optimizer.step()
    with pytest.raises(RecipeError, match=r"without handle\.apply\(\)"):
        step(model, optimizer)


def test_apply_once_for_several_optimizers_and_for_a_step_that_a_scaler_skips(toy):
    model = toy.model()
    parameters = list(model.parameters())
    optimizers = [sgd(parameters[::2]), sgd(parameters[1::2])]
    handle = drift_merge.attach(model, toy.prior)
    for seed in range(2):
        model.zero_grad()
        loss_of(model, seed).backward()
        handle.apply()
        for optimizer in optimizers:
            optimizer.step()
    model.zero_grad()
    loss_of(model).backward()
    handle.apply(found_inf=torch.ones(()))  # no step follows
    assert handle.steps == 2
    assert handle.num_biased == 3


def test_apply_with_a_loss_scale_is_that_of_unscaled_gradients(toy):
    found = []
    for scale in (None, 1024.0):
        model = toy.model()
        handle = drift_merge.attach(model, toy.prior, rule="absolute", alpha=1.0)
        (loss_of(model) * (scale or 1.0)).backward()
        handle.apply(scale=scale)
        found.append({n: p.grad / (scale or 1.0) for n, p in selected(model).items()})
    for name, gradient in found[0].items():
        assert torch.allclose(gradient, found[1][name], rtol=1e-5, atol=1e-7), name


@pytest.mark.parametrize("kind", [list, tuple, "wrapper"])
def test_several_optimizers_each_bias_what_they_hold(toy, kind):
    model = toy.model()
    matrices = [p for p in model.parameters() if p.ndim > 1]
    optimizers = [sgd(matrices), sgd([p for p in model.parameters() if p.ndim == 1])]

    class Several(torch.optim.Optimizer):
        """As VeOmni's: an Optimizer that never called Optimizer.__init__."""

        def __init__(self, optimizers):
            self.optimizers_dict = dict(enumerate(optimizers))

    given = Several(optimizers) if kind == "wrapper" else kind(optimizers)
    handle = drift_merge.attach(model, toy.prior, rule="gradnorm", optimizer=given)
    deltas = toy.deltas()
    for seed in range(2):
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss_of(model, seed).backward()
        before = {n: p.grad.clone() for n, p in selected(model).items()}
        for optimizer in optimizers:
            optimizer.step()
        for name, parameter in selected(model).items():
            wanted = biased("gradnorm", before[name], deltas[name])
            worst = float((parameter.grad.double() - wanted).abs().max())
            assert worst <= tolerance(parameter.grad, wanted), name
    assert handle.steps == 2
    assert handle.report()["bias_ratio"] == pytest.approx(1.0)
    with pytest.raises(RecipeError, match="does not know"):
        step(model, sgd(model.parameters()))


def test_one_of_two_optimizers_is_refused_with_the_way_to_give_both(toy):
    model = toy.model()
    one = sgd([p for p in model.parameters() if p.ndim > 1])
    with pytest.raises(RecipeError, match="does not hold 6 of the 20") as raised:
        drift_merge.attach(model, toy.prior, optimizer=one)
    assert "optimizer=[first, second]" in raised.value.remedy
    with pytest.raises(RecipeError, match="empty"):
        drift_merge.attach(model, toy.prior, optimizer=[])


def test_a_container_may_step_what_it_holds_and_nobody_else(toy):
    model = toy.model()
    parameters = list(model.parameters())
    inner = [sgd(parameters[::2]), sgd(parameters[1::2])]

    class Container(torch.optim.Optimizer):
        """As torchtitan's: an Optimizer of all parameters, whose step is that of the others."""

        def step(self, closure=None):
            for optimizer in inner:
                optimizer.step()

    container = Container(parameters, {"lr": RATE})
    handle = drift_merge.attach(model, toy.prior, optimizer=container)
    step(model, container)
    assert handle.steps == 1
    with pytest.raises(RecipeError, match="does not know"):
        step(model, inner[0])


def test_a_parameter_that_is_unfrozen_later_is_noticed(toy):
    model = toy.model()
    late = selected(model)["layers.1.mlp.up_proj.weight"].requires_grad_(False)
    optimizer = sgd(model.parameters())
    handle = drift_merge.attach(model, toy.prior, optimizer=optimizer)
    step(model, optimizer)
    late.requires_grad_(True)
    with pytest.raises(RecipeError, match=r"layers\.1\.mlp\.up_proj\.weight were frozen"):
        step(model, optimizer)
    handle.remove()
    with pytest.warns(UserWarning, match="tensors differ"):
        drift_merge.attach(model, toy.prior, optimizer=optimizer, strict=False)
    step(model, optimizer)


@pytest.mark.parametrize("is_there_before", [True, False])
def test_a_second_adapter_that_is_activated_later_is_noticed(is_there_before):
    model = torch.nn.Module()
    model.q_proj = ToyLora()
    if is_there_before:
        model.q_proj.add("second", 2, 1.0)
        model.q_proj.active_adapters = ["default"]
        model.q_proj.lora_A["second"].requires_grad_(False)
        model.q_proj.lora_B["second"].requires_grad_(False)
    matching = SimpleNamespace(
        coverage=SimpleNamespace(frozen=()), adapted={"q_proj.base_layer.weight": None}
    )
    watch = ModelWatch(model, matching)
    watch.check()
    if is_there_before:
        model.q_proj.lora_A["second"].requires_grad_(True)
        with pytest.raises(RecipeError, match="were frozen"):
            watch.check()
    else:
        model.q_proj.add("second", 2, 1.0)
        assert model.q_proj.active_adapters == ["default", "second"]
        with pytest.raises(RecipeError, match="active adapters of q_proj were changed"):
            watch.check()


def test_gradients_that_a_part_of_the_tensors_lose_in_backward_are_noticed(toy):
    model = toy.model()
    handle = drift_merge.attach(model, toy.prior)

    def step_now(parameter):
        parameter.data.add_(parameter.grad, alpha=-RATE)
        parameter.grad = None

    for parameter in selected(model).values():
        if parameter.ndim > 1:
            parameter.register_post_accumulate_grad_hook(step_now)
    loss_of(model).backward()
    with pytest.raises(RecipeError, match="14 of 20 tensors have no gradient at the step but"):
        handle.apply()


def test_optimizers_that_step_in_backward_are_noticed_at_once(toy):
    model = toy.model()
    drift_merge.attach(model, toy.prior, optimizer=sgd(model.parameters()))
    parameter = selected(model)["layers.1.mlp.up_proj.weight"]
    own = sgd([parameter])
    parameter.register_post_accumulate_grad_hook(lambda p: own.step())
    with pytest.raises(RecipeError, match="does not know"):
        loss_of(model).backward()


def test_copies_that_hooks_may_take_in_backward_are_warned_of_once(toy):
    model = toy.model()
    handle = drift_merge.attach(model, toy.prior)
    copies = {}
    for name, parameter in selected(model).items():
        hook = lambda p, name=name: copies.update({name: p.grad.clone()})  # noqa: E731
        parameter.register_post_accumulate_grad_hook(hook)
    loss_of(model).backward()
    with pytest.warns(UserWarning, match="20 of 20 tensors have hooks"):
        handle.apply()
    model.zero_grad()
    loss_of(model).backward()
    handle.apply()


def test_most_gradients_missing_is_warned_of(toy):
    model = toy.model()
    handle = drift_merge.attach(model, toy.prior)
    loss_of(model).backward()
    for parameter in list(selected(model).values())[:11]:
        parameter.grad = None
    with pytest.warns(UserWarning, match="11 of 20 tensors have no gradient"):
        handle.apply()


# One prior, one handle.


# Checkpoints of torch.distributed, which step an optimizer to make its state.
