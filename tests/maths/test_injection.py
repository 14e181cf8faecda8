"""The rules: their formulas, their sign, and what happens at zero."""

from math import sqrt

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from drift_merge.errors import RecipeError
from drift_merge.maths.injection import RULES, Sums, rule_named
from tests.strategies import quick, tensors
from tests.training.naive import biased

pairs = st.integers(1, 40).flatmap(
    lambda n: st.tuples(
        tensors((n,), torch.float64, edges=False), tensors((n,), torch.float64, edges=False)
    )
)


def sums_of(gradient: Tensor, delta: Tensor, mllm_norm: float = 2.0) -> Sums:
    return Sums(
        grad_sq=(gradient * gradient).sum().reshape(1),
        dot=(gradient * delta).sum().reshape(1),
        delta_norm=delta.norm().reshape(1),
        mllm_norm=torch.tensor([mllm_norm], dtype=torch.float64),
    )


def apply(rule: str, gradient: Tensor, delta: Tensor, alpha: float = 1.0) -> Tensor:
    if rule == "sign":  # its sums are of what it uses
        delta = torch.where(gradient * delta < 0, delta, 0.0)
    return gradient - alpha * RULES[rule](sums_of(gradient, delta)) * delta


@quick
@given(pairs, st.sampled_from(list(RULES)), st.floats(-2, 2))
def test_every_rule_is_the_naive_formula(pair, rule, alpha):
    gradient, delta = pair
    expected = biased(rule, gradient, delta, alpha=alpha, mllm_norm=2.0)
    assert torch.allclose(apply(rule, gradient, delta, alpha), expected, rtol=1e-12, atol=1e-12)


@quick
@given(pairs, st.floats(0, 3))
def test_gradnorm_changes_the_gradient_by_alpha_times_its_norm(pair, alpha):
    gradient, delta = pair
    change = (apply("gradnorm", gradient, delta, alpha) - gradient).norm()
    expected = alpha * gradient.norm() if delta.norm() else torch.zeros(())
    assert float(change) == pytest.approx(float(expected), rel=1e-9, abs=1e-12)


@quick
@given(pairs, st.sampled_from(("gradnorm", "adaptive_cosine")), st.floats(1e-3, 1e3))
def test_the_normed_rules_are_homogeneous_in_the_gradient(pair, rule, scale):
    gradient, delta = pair
    scaled = apply(rule, scale * gradient, delta)
    assert torch.allclose(scaled, scale * apply(rule, gradient, delta), rtol=1e-9, atol=1e-9)


@quick
@given(tensors((9,), torch.float64, edges=False), st.floats(1e-3, 1e3))
def test_adaptive_cosine_leaves_nothing_of_a_gradient_along_delta(delta, factor):
    gradient = factor * delta
    left = apply("adaptive_cosine", gradient, delta)
    assert float(left.norm()) <= 1e-7 * float(gradient.norm())


@quick
@given(tensors((9,), torch.float64, edges=False), st.floats(1e-3, 1e3))
def test_adaptive_cosine_leaves_a_gradient_against_delta_alone(delta, factor):
    gradient = -factor * delta
    left = apply("adaptive_cosine", gradient, delta)
    assert float((left - gradient).norm()) <= 1e-7 * float(gradient.norm())


@pytest.mark.parametrize("rule", list(RULES))
@pytest.mark.parametrize("zero", ["gradient", "delta", "both"])
def test_zeros_are_safe(rule, zero):
    gradient = torch.zeros(4) if zero != "delta" else torch.ones(4)
    delta = torch.zeros(4) if zero != "gradient" else torch.ones(4)
    found = apply(rule, gradient.double(), delta.double())
    assert torch.isfinite(found).all()
    if zero == "delta":
        assert torch.equal(found, gradient.double())
    if zero == "gradient" and rule in ("gradnorm", "adaptive_cosine"):
        assert torch.equal(found, gradient.double())


@pytest.mark.parametrize("rule", list(RULES))
def test_a_rule_takes_tensors_one_by_one(rule):
    generator = torch.Generator().manual_seed(0)
    gradients, deltas = torch.randn(2, 5, 7, generator=generator, dtype=torch.float64)
    each = [sums_of(g, d) for g, d in zip(gradients, deltas, strict=True)]
    joined = Sums(*(torch.cat([getattr(s, f) for s in each]) for f in Sums.__slots__))
    expected = torch.cat([RULES[rule](sums) for sums in each])
    assert torch.equal(RULES[rule](joined), expected)


@pytest.mark.parametrize("rule", list(RULES))
def test_descent_moves_the_weights_towards_the_reasoner(rule):
    """Of the gradient as well as of none: with the sign turned, both assertions fail."""
    generator = torch.Generator().manual_seed(1)
    theta, reasoner, gradient = torch.randn(3, 50, generator=generator, dtype=torch.float64)
    delta = reasoner - theta
    plain = theta - 0.01 * gradient
    drawn = theta - 0.01 * apply(rule, gradient, delta)
    assert float((drawn - plain) @ delta) > 0
    assert float((drawn - reasoner).norm()) < float((plain - reasoner).norm())
    turned = theta - 0.01 * (2 * gradient - apply(rule, gradient, delta))  # g + alpha * c * delta
    assert float((turned - plain) @ delta) < 0
    assert float((turned - reasoner).norm()) > float((plain - reasoner).norm())


def test_worked_example_of_the_four_rules():
    gradient = torch.tensor([3.0, 4.0], dtype=torch.float64)
    delta = torch.tensor([0.0, 2.0], dtype=torch.float64)
    # |g| = 5, |delta| = 2, cos = 0.8, |theta| = 2
    assert apply("absolute", gradient, delta).tolist() == [3.0, 2.0]
    assert apply("absolute_param_norm", gradient, delta).tolist() == [3.0, 2.0]
    assert apply("gradnorm", gradient, delta).tolist() == [3.0, -1.0]
    assert apply("adaptive_cosine", gradient, delta).tolist() == pytest.approx([3.0, -0.5])


def test_an_unknown_rule_is_refused_and_the_known_ones_are_listed():
    with pytest.raises(RecipeError, match=r"'cosine'.*absolute, absolute_param_norm, gradnorm"):
        rule_named("cosine")


def test_a_rule_of_ones_own_is_called_by_its_name():
    def halved(sums: Sums) -> Tensor:
        return sums.grad_sq.sqrt() / 2

    assert rule_named(halved) == ("halved", halved)
    assert float(halved(sums_of(torch.ones(4).double(), torch.ones(4).double()))) == sqrt(4) / 2
