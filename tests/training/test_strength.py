"""What a user is told of the strength: the warning, the distance to expect, 16-bit gradients."""

import warnings
from math import sqrt

import pytest
import torch

import drift_merge
from drift_merge.training.options import RULE_TRAITS
from tests.training.naive import biased
from tests.training.toys import loss_of, selected

RATE = 1e-4


def step(model, optimizer, seed=0):
    loss_of(model, seed).backward()
    optimizer.step()
    optimizer.zero_grad()


def adam(model):
    return torch.optim.AdamW(model.parameters(), lr=RATE)


def test_a_bias_of_many_gradients_is_warned_of_once_with_the_way_out(toy):
    model = toy.model()
    optimizer = adam(model)
    handle = drift_merge.attach(model, toy.prior, rule="absolute", alpha=1.0, optimizer=optimizer)
    with pytest.warns(UserWarning, match=r"the bias is \d+ times the gradient at step 1") as seen:
        step(model, optimizer)
    message = str(seen[0].message)
    ratio = handle.report()["bias_ratio"]
    assert f"the bias is {ratio:,.0f} times" in message
    alpha = float(message.partition("alpha=")[2].partition(",")[0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for seed in range(1, 5):
            step(model, optimizer, seed)
    handle.remove()
    again = toy.model()
    handle = drift_merge.attach(again, toy.prior, rule="absolute", alpha=alpha)
    loss_of(again).backward()
    handle.apply()
    assert 0.5 < handle.report()["bias_ratio"] < 2.0


@pytest.mark.parametrize("rule", list(RULE_TRAITS))
def test_at_the_default_alpha_the_bias_is_at_most_about_the_gradient(toy, rule):
    model = toy.model()
    optimizer = adam(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        handle = drift_merge.attach(model, toy.prior, rule=rule, optimizer=optimizer)
        step(model, optimizer)
    assert 0.005 < handle.report()["bias_ratio"] <= 1.01


def test_no_gradient_at_all_is_no_strength(toy):
    model = toy.model()
    handle = drift_merge.attach(model, toy.prior, rule="absolute", alpha=1.0)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        handle.apply()


def test_the_expected_distance_is_the_formula_and_is_printed(toy):
    model = toy.model()
    handle = drift_merge.attach(model, toy.prior, optimizer=adam(model))
    shares = [
        sqrt(len(toy.deltas()[n].flatten()) * float(toy.deltas()[n].double().norm() ** 2))
        for n in selected(model)
    ]
    total = sum(float(toy.deltas()[n].double().norm() ** 2) for n in selected(model))
    expected = RATE * sqrt(0.2) * sum(shares) / total  # r = 1/2: 0.447 = sqrt(1/5)
    assert handle.report()["expected_distance"] == pytest.approx(expected, rel=1e-5)
    assert f"a step travels about {expected:.1e} of the way" in handle.describe()


@pytest.mark.parametrize("rule", ["adaptive_cosine", "gradnorm"])
def test_a_run_travels_about_what_is_expected(toy, rule):
    model = toy.model()
    optimizer = adam(model)
    handle = drift_merge.attach(model, toy.prior, rule=rule, optimizer=optimizer)
    expected = 0.0
    for seed in range(20):
        step(model, optimizer, seed)
        expected += handle.report()["expected_distance"]
    assert 0.5 < handle.report()["distance"] / expected < 2.0


def test_what_is_not_known_is_not_expected(toy):
    model = toy.model()
    sgd = torch.optim.SGD(model.parameters(), lr=RATE)
    handle = drift_merge.attach(model, toy.prior, optimizer=sgd)
    assert handle.report()["expected_distance"] is None
    assert "travels" not in handle.describe()
    handle.remove()
    handle = drift_merge.attach(model, toy.prior, rule="absolute", optimizer=adam(model))
    assert handle.report()["expected_distance"] is None  # its strength is known after a step


@pytest.mark.parametrize(("alpha", "kept"), [(1.0, 1.0), (0.1, 1.0), (0.01, 0.99), (0.001, 0.28)])
def test_a_gradient_in_bfloat16_loses_a_weak_bias(toy, alpha, kept):
    model = toy.model(torch.bfloat16)
    handle = drift_merge.attach(model, toy.prior, alpha=alpha)
    generator = torch.Generator().manual_seed(0)
    before = {}
    for name, parameter in selected(model).items():
        parameter.grad = torch.randn(parameter.shape, generator=generator).bfloat16()
        before[name] = parameter.grad.double()
    handle.apply()
    found = wanted = 0.0
    for name, parameter in selected(model).items():
        delta = toy.deltas()[name].double()
        change = before[name] - parameter.grad.double()
        found += float((change * delta).sum() / delta.norm())
        exact = biased("adaptive_cosine", before[name], delta, alpha=alpha)
        wanted += float(((before[name] - exact) * delta).sum() / delta.norm())
    assert found / wanted == pytest.approx(kept, abs=0.08)
