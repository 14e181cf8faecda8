"""Rules whose delta is another at each step, and `until`: by descending, against float64."""

import json
import shutil

import pytest
import torch

import drift_merge
from drift_merge.errors import RecipeError, VerificationError
from drift_merge.training.options import RULE_TRAITS
from tests.training.naive import biased
from tests.training.toys import loss_of, make_toy, memory_tensors, selected

RATE = 0.05


def descend(toy, rule, alpha, steps, model=None, **options):
    """Train on tokens by SGD with the rule; the handle and the model."""
    model = toy.model() if model is None else model
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    handle = drift_merge.attach(
        model, toy.prior, rule=rule, alpha=alpha, optimizer=optimizer, **options
    )
    for _ in range(steps):
        loss_of(model, handle.steps).backward()
        optimizer.step()
        optimizer.zero_grad()
    return handle, model


def descend_by_hand(toy, rule, alpha, steps):
    """The same in float64: the gradients of the float64 model, the naive formula."""
    model = toy.model(torch.float64)
    begin = {name: p.detach().clone() for name, p in selected(model).items()}
    deltas = toy.deltas()
    for step in range(steps):
        model.zero_grad()
        loss_of(model.double(), step).backward()
        for parameter in set(model.parameters()) - set(selected(model).values()):
            if parameter.grad is not None:
                parameter.data -= RATE * parameter.grad
        for name, parameter in selected(model).items():
            delta = deltas[name].double()
            if rule == "anchor":
                delta = delta + begin[name] - parameter.detach()
            gradient = biased(rule, parameter.grad, delta, alpha=alpha)
            parameter.data -= RATE * gradient
    return model


def without_data(model, optimizer, steps):
    for _ in range(steps):
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()


@pytest.mark.parametrize(("rule", "alpha"), [("sign", 0.7), ("anchor", 2.0)])
def test_descent_is_that_of_the_naive_formula_in_float64(toy, rule, alpha):
    _, model = descend(toy, rule, alpha, steps=4)
    by_hand = dict(descend_by_hand(toy, rule, alpha, steps=4).named_parameters())
    start = dict(toy.model(torch.float64).named_parameters())
    for name, parameter in model.named_parameters():
        moved = float((by_hand[name] - start[name]).detach().norm())
        # 4 steps of float32; entries of a gradient at about 0 may be on the other side of it.
        difference = parameter.detach().double() - by_hand[name].detach()
        assert float(difference.norm()) <= 1e-4 * moved + 1e-6, name


def test_anchor_arrives_at_the_reasoner_and_stays(toy):
    model = toy.model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    handle = drift_merge.attach(model, toy.prior, rule="anchor", alpha=1.0, optimizer=optimizer)
    for steps in (1, 2, 3):
        without_data(model, optimizer, 1)
        assert handle.report()["distance"] == pytest.approx(1 - 0.5**steps, abs=1e-5)
    without_data(model, optimizer, 30)
    assert handle.report()["distance"] == pytest.approx(1.0, abs=1e-6)
    reasoner = memory_tensors(toy.pair.reasoner)
    for name, parameter in model.named_parameters():
        if "_proj" in name and "language_model" in name:
            assert torch.allclose(parameter, reasoner[name], atol=1e-6), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_anchor_in_other_dtypes_takes_what_is_left_from_the_weights(toy, dtype):
    model = toy.model(dtype)
    begin = {name: p.detach().double().clone() for name, p in selected(model).items()}
    handle = drift_merge.attach(model, toy.prior, rule="anchor", alpha=0.5)
    for name, parameter in selected(model).items():
        with torch.no_grad():
            parameter += 0.25 * toy.deltas()[name].to(dtype)
        parameter.grad = torch.zeros_like(parameter)
    handle.apply()
    for name, parameter in selected(model).items():
        left = toy.deltas()[name].double() + begin[name] - parameter.detach().double()
        limit = 4 * torch.finfo(dtype).eps if dtype == torch.bfloat16 else 1e-7
        assert torch.allclose(parameter.grad.double(), -0.5 * left, rtol=limit, atol=limit), name


def test_sign_lowers_the_loss_that_its_gradient_is_of(toy):
    model = toy.model()
    handle = drift_merge.attach(model, toy.prior, rule="sign")
    loss_of(model).backward()
    before = {name: p.grad.clone() for name, p in selected(model).items()}
    handle.apply()
    for name, parameter in selected(model).items():
        bias = parameter.grad - before[name]
        assert bool((bias * before[name] >= 0).all()), name  # descent by the bias lowers it too
        assert float(bias.norm()) == pytest.approx(float(before[name].norm()), rel=1e-4)
    report = handle.report()
    assert report["bias_ratio"] == pytest.approx(1.0, rel=1e-4)
    assert report["cosine"] < 0


@pytest.mark.parametrize("is_attached_first", [False, True])
def test_a_resumed_run_with_anchor_goes_on_exactly(toy, is_attached_first):
    _, whole = descend(toy, "anchor", 2.0, steps=4)
    handle, model = descend(toy, "anchor", 2.0, steps=2)
    state, weights = json.loads(json.dumps(handle.state_dict())), model.state_dict()
    again = toy.model()
    if is_attached_first:
        optimizer = torch.optim.SGD(again.parameters(), lr=RATE)
        resumed = drift_merge.attach(
            again, toy.prior, rule="anchor", alpha=2.0, optimizer=optimizer
        )
        again.load_state_dict(weights)
        resumed.load_state_dict(state)
        for step in (2, 3):
            loss_of(again, step).backward()
            optimizer.step()
            optimizer.zero_grad()
    else:
        again.load_state_dict(weights)
        descend(toy, "anchor", 2.0, steps=2, model=again, state=state)
    for one, other in zip(whole.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)


def test_anchor_says_where_the_weights_of_its_beginning_are_missing(tmp_path):
    toy = make_toy(tmp_path)
    handle, model = descend(toy, "anchor", 2.0, steps=1)
    handle.remove()
    shutil.rmtree(toy.pair.mllm)
    with pytest.raises(RecipeError, match="began with") as caught:
        drift_merge.attach(
            model, toy.prior, rule="anchor", alpha=2.0, state=handle.state_dict()
        ).apply()
    assert "load_state_dict(state)" in caught.value.remedy


def test_anchor_from_other_weights_is_refused_without_strict_too(toy):
    model = toy.model()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1
    with pytest.raises(VerificationError, match="computed against"):
        drift_merge.attach(model, toy.prior, rule="anchor", strict=False)


@pytest.mark.parametrize("negate", [False, True])
@pytest.mark.parametrize("rule", ["absolute", "anchor"])
def test_until_stops_at_the_distance_and_holds(toy, rule, negate):
    model = toy.model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    handle = drift_merge.attach(
        model, toy.prior, rule=rule, alpha=1.0, until=0.05, negate=negate, optimizer=optimizer
    )
    without_data(model, optimizer, 2)
    assert handle.report()["arrived"]["count"] == 0
    without_data(model, optimizer, 5)
    report = handle.report()
    assert 0.05 <= abs(report["distance"]) <= 0.0625
    assert (report["distance"] < 0) == negate
    assert report["arrived"]["count"] == len(report["tensors"])
    with torch.no_grad():  # the data take it back: it is pulled again
        for name, parameter in selected(model).items():
            parameter -= (-1 if negate else 1) * 0.03 * toy.deltas()[name]
    without_data(model, optimizer, 1)
    assert handle.report()["arrived"]["count"] == 0


def test_what_has_arrived_is_trained_by_the_data_alone(toy):
    model = toy.model()
    handle = drift_merge.attach(model, toy.prior, until=0.5)
    loss_of(model).backward()
    for name, parameter in selected(model).items():
        with torch.no_grad():
            parameter += 0.6 * toy.deltas()[name]
    before = {name: p.grad.clone() for name, p in selected(model).items()}
    handle.apply()
    assert all(torch.equal(p.grad, before[name]) for name, p in selected(model).items())


def test_until_and_control_are_part_of_the_state(toy):
    handle = drift_merge.attach(toy.model(), toy.prior, until=0.1)
    with pytest.raises(RecipeError, match=r"until was 0\.1, is None"):
        drift_merge.attach(toy.model(), toy.prior, state=handle.state_dict())
    older = {k: v for k, v in handle.state_dict().items() if k not in ("until", "control")}
    with pytest.warns(UserWarning, match=r"until was None, is 0\.2"):
        drift_merge.attach(toy.model(), toy.prior, until=0.2, strict=False, state=older)
    drift_merge.attach(toy.model(), toy.prior, state=older)


@pytest.mark.parametrize("until", [0.0, -1.0, float("nan"), "0.05"])
def test_until_is_a_share_of_the_way(toy, until):
    with pytest.raises(RecipeError, match="until"):
        drift_merge.attach(toy.model(), toy.prior, until=until)


def test_alpha_by_name_and_by_rule(toy):
    def alphas(**options):
        handle = drift_merge.attach(toy.model(), toy.prior, **options)
        return set(handle.state_dict()["alpha"].values())

    for rule, traits in RULE_TRAITS.items():
        assert alphas(rule=rule) == {traits.alpha}
        if traits.published is not None:
            assert alphas(rule=rule, alpha="published") == {traits.published}
    for options in ({"rule": "sign", "alpha": "published"}, {"alpha": "strong"}):
        with pytest.raises(RecipeError, match="alpha is"):
            alphas(**options)
