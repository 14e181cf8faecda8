"""attach and its handle: what is biased, by how much, when, and what is refused."""

import re

import pytest
import torch

import drift_merge
from drift_merge.errors import RecipeError
from drift_merge.priors.deltas import open_deltas
from tests.training.naive import RULES, biased
from tests.training.toys import (
    expected,
    gradients,
    loss_of,
    make_toy,
    require_equal,
    selected,
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rule", RULES)
def test_apply_is_the_naive_formula_in_every_dtype(toy, rule, dtype):
    model = toy.model(dtype)
    handle = drift_merge.attach(model, toy.prior, rule=rule, alpha=0.7)
    loss_of(model).backward()
    before = gradients(model)
    rest = model.lm_head.weight.grad.clone()
    handle.apply()
    require_equal(gradients(model), expected(toy, before, rule, 0.7))
    assert torch.equal(model.lm_head.weight.grad, rest)


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_change_no_bit(toy, threads):
    model = toy.model()
    handle = drift_merge.attach(model, toy.prior)
    loss_of(model).backward()
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        handle.apply()
    finally:
        torch.set_num_threads(before)
    found = torch.cat([g.flatten() for g in gradients(model).values()])
    other = toy.model()
    loss_of(other).backward()
    drift_merge.attach(other, toy.prior).apply()
    assert torch.equal(found, torch.cat([g.flatten() for g in gradients(other).values()]))


@pytest.mark.parametrize("rule", RULES)
def test_one_step_of_sgd_moves_the_weights_towards_the_reasoner(toy, rule):
    moved = {}
    for alpha in (0.0, 1.0, -1.0):
        model = toy.model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        options = {"rule": rule, "alpha": alpha, "negate": alpha < 0}
        handle = drift_merge.attach(model, toy.prior, optimizer=optimizer, **options)
        loss_of(model).backward()
        optimizer.step()
        moved[alpha] = handle.report()["distance"]
    assert moved[1.0] > moved[0.0] > moved[-1.0]


def test_alpha_zero_leaves_every_gradient_bit_for_bit(toy):
    model = toy.model()
    handle = drift_merge.attach(model, toy.prior, alpha=0.0)
    loss_of(model).backward()
    first = selected(model)["layers.0.mlp.up_proj.weight"]
    first.grad[0] = -0.0
    before = {name: g.view(torch.int32) for name, g in gradients(model).items()}
    handle.apply()
    after = {name: g.view(torch.int32) for name, g in gradients(model).items()}
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_gradnorm_changes_a_gradient_by_alpha_times_its_norm(toy):
    model = toy.model()
    handle = drift_merge.attach(model, toy.prior, rule="gradnorm", alpha=0.3)
    loss_of(model).backward()
    before = gradients(model)
    handle.apply()
    for name, gradient in gradients(model).items():
        change = float((gradient - before[name]).norm())
        assert change == pytest.approx(0.3 * float(before[name].norm()), rel=1e-5)


def test_alpha_may_differ_by_module(toy):
    model = toy.model()
    alphas = {"attn": 1.0, "mlp": 0.25}
    handle = drift_merge.attach(model, toy.prior, rule="absolute", alpha=alphas)
    loss_of(model).backward()
    before = gradients(model)
    handle.apply()
    require_equal(gradients(model), expected(toy, before, "absolute", alphas))


def test_a_rule_of_ones_own_gets_the_sums_and_its_coefficients_are_used(toy):
    model = toy.model()
    seen = []

    def tenth(sums):
        seen.append(sums)
        return torch.full_like(sums.dot, 0.1)

    handle = drift_merge.attach(model, toy.prior, rule=tenth)
    loss_of(model).backward()
    before = gradients(model)
    handle.apply()
    require_equal(gradients(model), expected(toy, before, "absolute", 0.1))
    assert sum(len(s.dot) for s in seen) == len(before)
    assert handle.report()["rule"] == "tenth"


def test_two_priors_are_added_with_their_weights(toy, other_toy):
    model = toy.model()
    priors = [toy.prior, str(other_toy.prior.path)]
    handle = drift_merge.attach(model, priors, weights=[1.0, -0.5], rule="gradnorm")
    loss_of(model).backward()
    before = gradients(model)
    handle.apply()
    one, other = toy.deltas(), other_toy.deltas()
    wanted = {
        name: biased("gradnorm", g, one[name].double() - 0.5 * other[name].double())
        for name, g in before.items()
    }
    require_equal(gradients(model), wanted)


def test_a_negated_prior_pushes_away(toy):
    model, negated = toy.model(), toy.model()
    for one, weights in ((model, None), (negated, [-1.0])):
        handle = drift_merge.attach(one, toy.prior, weights=weights, rule="gradnorm")
        loss_of(one).backward()
        before = gradients(one)
        handle.apply()
        after = gradients(one)
        name = "layers.1.mlp.up_proj.weight"
        drawn = float(((before[name] - after[name]) * toy.deltas()[name]).sum())
        assert drawn * (1 if weights is None else -1) > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rule": "drift"}, "rule is 'drift'"),
        ({"when": "epoch"}, "when is 'epoch'"),
        ({"device": "tpu"}, "device is 'tpu'"),
        ({"alpha": float("nan")}, "alpha is nan"),
        ({"alpha": {"attn": 1.0}}, "missing: mlp"),
        ({"alpha": {"attn": 1.0, "mlp": 1.0, "norm": 1.0}}, "not selected: norm"),
        ({"modules": "atn"}, "Did you mean 'attn'"),
        ({"schedule": "warmup"}, "schedule is 'warmup'"),
        ({"schedule": "cosine"}, "needs total_steps"),
        ({"weights": [1.0, 2.0]}, "expected 1 numbers"),
        ({"weights": [0.0]}, "not all 0"),
        ({"alpha": -1.0}, "moves the weights away from the reasoner"),
        ({"alpha": {"attn": 1.0, "mlp": -0.5}}, "alpha of mlp is -0.5"),
    ],
)
def test_an_argument_that_is_not_valid_is_refused(toy, options, message):
    with pytest.raises(RecipeError, match=message):
        drift_merge.attach(toy.model(), toy.prior, **options)


@pytest.mark.parametrize("alpha", [0.5, -0.5])
def test_negate_and_a_negative_weight_move_away(toy, alpha):
    found = []
    for options in (
        {"alpha": alpha, "negate": True},
        {"alpha": 0.5, "weights": [-1.0]},
        {"alpha": -0.5, "weights": [-1.0]},  # both: towards the reasoner again
    ):
        model = toy.model()
        handle = drift_merge.attach(model, toy.prior, rule="absolute", **options)
        loss_of(model).backward()
        before = gradients(model)
        handle.apply()
        found.append({name: g - before[name] for name, g in gradients(model).items()})
        handle.remove()
    for name, change in found[0].items():
        assert torch.equal(change, found[1][name]), name
        assert torch.allclose(change, -found[2][name], atol=1e-6), name
        assert float((change * toy.deltas()[name]).sum()) > 0


def test_an_empty_list_of_priors_is_refused(toy):
    with pytest.raises(RecipeError, match="no prior"):
        drift_merge.attach(toy.model(), [])


def test_modules_may_be_a_list_and_are_never_read_by_characters(toy):
    text = drift_merge.attach(toy.model(), toy.prior, modules="mlp")
    listed = drift_merge.attach(toy.model(), toy.prior, modules=["mlp"])
    assert text.coverage == listed.coverage
    assert text.coverage.units == 6


def test_layers_select(toy):
    for layers in ("1:", "1", 1, [1], (1,)):
        handle = drift_merge.attach(toy.model(), toy.prior, layers=layers)
        assert handle.coverage.units == 10, layers


def test_the_handle_says_its_formula_and_sign(toy):
    text = repr(drift_merge.attach(toy.model(), toy.prior))
    assert "g' = g - alpha * coefficient * delta" in text
    assert "towards the reasoner" in text
    assert re.search(r"20 of 20 selected tensors matched", text)
    handle = drift_merge.attach(toy.model(), toy.prior)
    assert handle.describe() in repr(handle)


def test_a_sparse_gradient_is_refused(tmp_path):
    toy = make_toy(tmp_path, modules="embed")
    model = toy.model()
    model.model.language_model.embed_tokens.sparse = True
    handle = drift_merge.attach(model, toy.prior, modules="embed")
    loss_of(model).backward()
    with pytest.raises(RecipeError, match="is sparse"):
        handle.apply()


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn"])
def test_a_compressed_prior_is_used_with_the_norms_of_what_is_stored(tmp_path, dtype):
    toy = make_toy(tmp_path, dtype=dtype)
    model = toy.model()
    handle = drift_merge.attach(model, toy.prior, rule="gradnorm")
    loss_of(model).backward()
    before = gradients(model)
    handle.apply()
    with open_deltas(toy.prior) as deltas:
        wanted = {n: biased("gradnorm", g, deltas.read(n).view(g.shape)) for n, g in before.items()}
    require_equal(gradients(model), wanted)
