"""What attach() does with an optimizer: hooks, closures, and what it refuses."""

import pytest
import torch
from torch import nn

import drift_merge
from drift_merge.errors import RecipeError
from tests.training.toys import expected, gradients, loss_of, require_equal, selected


def test_a_hooked_optimizer_biases_once_per_step_and_remove_ends_it(toy):
    model = toy.model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    handle = drift_merge.attach(model, toy.prior, optimizer=optimizer)
    for _ in range(2):
        optimizer.zero_grad()
        loss_of(model).backward()
        before = gradients(model)
        optimizer.step()
        require_equal(gradients(model), expected(toy, before, "adaptive_cosine"))
    assert handle.steps == 2
    handle.remove()
    handle.remove()
    optimizer.zero_grad()
    loss_of(model).backward()
    before = gradients(model)
    optimizer.step()
    assert all(torch.equal(before[name], g) for name, g in gradients(model).items())
    with pytest.raises(RecipeError, match="removed"):
        handle.apply()


def test_attach_and_remove_leave_plain_training_bit_for_bit(toy):
    weights = []
    for is_attached in (False, True):
        model = toy.model()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        if is_attached:
            drift_merge.attach(model, toy.prior, optimizer=optimizer).remove()
            drift_merge.attach(model, toy.prior, when="microbatch").remove()
        for step in range(3):
            optimizer.zero_grad()
            loss_of(model, step).backward()
            optimizer.step()
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(*weights)


def test_apply_beside_a_hooked_optimizer_is_refused(toy):
    model = toy.model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle = drift_merge.attach(model, toy.prior, optimizer=optimizer)
    loss_of(model).backward()
    with pytest.raises(RecipeError, match="optimizer is hooked"):
        handle.apply()


def test_the_same_gradients_are_not_biased_twice(toy):
    model = toy.model()
    handle = drift_merge.attach(model, toy.prior)
    loss_of(model).backward()
    handle.apply()
    with pytest.raises(RecipeError, match="biased already"):
        handle.apply()
    loss_of(model, 1).backward()  # accumulates on top: other gradients
    handle.apply()
    model.zero_grad()
    loss_of(model, 2).backward()
    handle.apply()
    assert handle.steps == 3


def test_no_gradient_at_all_is_an_error_with_its_cause(toy):
    model = toy.model()
    handle = drift_merge.attach(model, toy.prior)
    with pytest.raises(RecipeError, match=r"none of the 20 tensors .* has a gradient"):
        handle.apply()
    assert handle.steps == 0


def test_missing_gradients_are_counted_and_named(toy):
    model = toy.model()
    handle = drift_merge.attach(model, toy.prior)
    loss_of(model).backward()
    selected(model)["layers.1.self_attn.o_proj.weight"].grad = None
    before = {n: p.grad.clone() for n, p in selected(model).items() if p.grad is not None}
    handle.apply()
    missing = handle.report()["missing_gradients"]
    name = "model.language_model.layers.1.self_attn.o_proj.weight"
    assert missing == {"count": 1, "names": [name]}
    found = {n: p.grad for n, p in selected(model).items() if p.grad is not None}
    require_equal(found, expected(toy, before, "adaptive_cosine"))


def test_a_closure_is_refused_and_apply_within_it_works(toy):
    model = toy.model()
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=2)
    handle = drift_merge.attach(model, toy.prior, optimizer=optimizer)

    def closure():
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        if not handle._is_hooked:
            handle.apply()
        return loss

    with pytest.raises(RecipeError, match="closure"):
        optimizer.step(closure)
    handle.remove()
    handle = drift_merge.attach(model, toy.prior, strict=False)
    optimizer.step(closure)
    assert handle.steps >= 1


def test_a_step_without_a_closure_may_say_so(toy):
    model = toy.model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle = drift_merge.attach(model, toy.prior, optimizer=optimizer)
    loss_of(model).backward()
    optimizer.step(None)  # as accelerate does
    loss_of(model).backward()
    optimizer.step(closure=None)
    assert handle.steps == 2


def test_an_optimizer_of_other_parameters_is_refused(toy):
    model, other = toy.model(), toy.model()
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    with pytest.raises(RecipeError, match="does not hold 20 of the 20 parameters"):
        drift_merge.attach(model, toy.prior, optimizer=optimizer)


def test_what_is_no_optimizer_is_refused(toy):
    with pytest.raises(RecipeError, match=r"optimizer is a Linear"):
        drift_merge.attach(toy.model(), toy.prior, optimizer=nn.Linear(1, 1))


def test_an_accelerated_optimizer_is_unwrapped(toy):
    model = toy.model()
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    wrapper = type("AcceleratedOptimizer", (), {"__module__": "accelerate.optimizer"})()
    wrapper.optimizer = inner
    handle = drift_merge.attach(model, toy.prior, optimizer=wrapper)
    loss_of(model).backward()
    inner.step()
    assert handle.steps == 1


def test_an_optimizer_of_deepspeed_that_is_not_known_is_refused_by_name():
    from drift_merge.training.gradients import deepspeed

    class ZenFlowZeroOptimizerSequential:
        """Stands for any class of DeepSpeed's whose gradients at the step are unknown."""

        optimizer = None

    with pytest.raises(RecipeError, match="ZenFlowZeroOptimizerSequential") as caught:
        deepspeed.deepspeed_layout(torch.nn.Linear(1, 1), ZenFlowZeroOptimizerSequential())
    assert "without ZenFlow and SuperOffload" in caught.value.remedy
