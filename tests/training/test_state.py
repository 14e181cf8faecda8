"""Schedules, and runs that are stopped and resumed."""

import json
from math import cos, pi

import pytest
import torch

import drift_merge
from drift_merge.errors import RecipeError
from drift_merge.training.schedules import factor_of
from tests.training.toys import loss_of


def weights_of(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def train(model, optimizer, steps):
    for step in steps:
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()


OPTIONS = {"schedule": "cosine", "total_steps": 6, "alpha": {"attn": 1.0, "mlp": 0.5}}


def test_a_resumed_run_continues_bit_for_bit(toy):
    whole = toy.model()
    optimizer = torch.optim.AdamW(whole.parameters(), lr=1e-2)
    handle = drift_merge.attach(whole, toy.prior, optimizer=optimizer, **OPTIONS)
    train(whole, optimizer, range(6))
    report = handle.report()

    first = toy.model()
    optimizer = torch.optim.AdamW(first.parameters(), lr=1e-2)
    handle = drift_merge.attach(first, toy.prior, optimizer=optimizer, **OPTIONS)
    train(first, optimizer, range(3))
    saved = json.loads(json.dumps(handle.state_dict()))
    weights, moments = first.state_dict(), optimizer.state_dict()

    second = toy.model()
    second.load_state_dict(weights)
    optimizer = torch.optim.AdamW(second.parameters(), lr=1e-2)
    optimizer.load_state_dict(moments)
    handle = drift_merge.attach(second, toy.prior, optimizer=optimizer, state=saved, **OPTIONS)
    assert handle.steps == 3
    train(second, optimizer, range(3, 6))
    assert torch.equal(weights_of(second), weights_of(whole))
    assert handle.report() == report


def test_a_state_can_be_loaded_after_attach(toy):
    model = toy.model()
    handle = drift_merge.attach(model, toy.prior)
    loss_of(model).backward()
    handle.apply()
    other = drift_merge.attach(toy.model(), toy.prior)
    other.load_state_dict(handle.state_dict())
    assert other.steps == 1
    assert other.state_dict() == handle.state_dict()


def test_another_prior_is_refused_with_both_fingerprints(toy, other_toy):
    state = drift_merge.attach(other_toy.model(), other_toy.prior).state_dict()
    with pytest.raises(RecipeError) as error:
        drift_merge.attach(toy.model(), toy.prior, state=state, strict=False)
    assert toy.prior.manifest["seal"] in error.value.message
    assert other_toy.prior.manifest["seal"] in error.value.message


def test_another_selection_is_refused(toy):
    state = drift_merge.attach(toy.model(), toy.prior).state_dict()
    with pytest.raises(RecipeError, match="another selection"):
        drift_merge.attach(toy.model(), toy.prior, modules="mlp", state=state)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": 2.0}, "alpha was .*1.0.* is .*2.0"),
        ({"rule": "gradnorm"}, "rule was 'adaptive_cosine', is 'gradnorm'"),
        ({"schedule": "linear", "total_steps": 5}, "schedule was 'constant', is 'linear'"),
    ],
)
def test_other_settings_are_refused_or_warned_of(toy, options, message):
    state = drift_merge.attach(toy.model(), toy.prior).state_dict()
    with pytest.raises(RecipeError, match=message):
        drift_merge.attach(toy.model(), toy.prior, state=state, **options)
    with pytest.warns(UserWarning, match=message):
        drift_merge.attach(toy.model(), toy.prior, state=state, strict=False, **options)


def test_what_is_no_state_is_refused(toy):
    with pytest.raises(RecipeError, match="format version None"):
        drift_merge.attach(toy.model(), toy.prior, state={})


def test_schedules_are_what_they_are_called():
    assert [factor_of(None, None)(t) for t in (0, 5)] == [1.0, 1.0]
    assert [factor_of("constant", 3)(t) for t in (0, 5)] == [1.0, 1.0]
    assert [factor_of("linear", 4)(t) for t in range(6)] == [1.0, 0.75, 0.5, 0.25, 0.0, 0.0]
    expected = [(1 + cos(pi * t / 4)) / 2 for t in range(5)] + [0.0]
    assert [factor_of("cosine", 4)(t) for t in range(6)] == pytest.approx(expected)
    assert factor_of(lambda t: 2.0 * t, None)(3) == 6.0


def test_alpha_follows_the_schedule(toy):
    model = toy.model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    handle = drift_merge.attach(
        model,
        toy.prior,
        optimizer=optimizer,
        rule="absolute",
        alpha=1.0,
        schedule="linear",
        total_steps=4,
    )
    seen = []
    for step in range(5):
        train(model, optimizer, [step])
        metrics = handle.metrics()
        seen.append((metrics["drift/alpha"], metrics["drift/coefficient"]))
    assert seen == [(f, f) for f in (1.0, 0.75, 0.5, 0.25, 0.0)]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -0.5, None, "half"], ids=repr)
def test_a_schedule_that_gives_no_factor_is_an_error_before_any_gradient_changes(toy, value):
    def broken(step):
        return 1.0 if step == 0 else value

    model = toy.model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle = drift_merge.attach(model, toy.prior, optimizer=optimizer, schedule=broken)
    train(model, optimizer, [0])
    optimizer.zero_grad()
    loss_of(model, 1).backward()
    before = weights_of(model), [p.grad.clone() for p in model.parameters() if p.grad is not None]
    with pytest.raises(RecipeError, match=r"schedule .*broken returned .* for step 1"):
        optimizer.step()
    assert torch.equal(weights_of(model), before[0])
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert all(torch.equal(one, two) for one, two in zip(gradients, before[1], strict=True))
    assert handle.steps == 1


def test_a_schedule_may_return_numbers_of_torch():
    assert factor_of(lambda step: torch.tensor(0.5), None)(0) == 0.5
