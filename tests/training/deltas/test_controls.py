"""Controls: equal norms, another direction, the same for any region and seed."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import drift_merge
from drift_merge.errors import RecipeError
from drift_merge.priors.deltas import open_deltas
from drift_merge.training.deltas.controls import ControlDeltas, read_control
from tests.strategies import quick
from tests.training.naive import biased, tolerance
from tests.training.toys import loss_of, make_toy, selected

KINDS = ("random", "permuted")


@pytest.fixture(scope="module", params=["float32", "int8"])
def prior(request, tmp_path_factory):
    return make_toy(tmp_path_factory.mktemp("made"), dtype=request.param).prior


def control_of(prior, text):
    return ControlDeltas(open_deltas(prior), read_control(text), prior.tensors)


def whole(deltas, name):
    rows, cols = deltas.matrix(name)
    return deltas.block(name, (0, rows), (0, cols))


@pytest.mark.parametrize("kind", KINDS)
def test_every_tensor_has_the_norm_of_its_delta_and_another_direction(prior, kind):
    deltas, control = open_deltas(prior), control_of(prior, f"{kind}:3")
    dot = total = 0.0
    for name in prior.tensors:
        one, other = deltas.read(name).double(), whole(control, name).double()
        assert float(other.norm()) == pytest.approx(float(one.norm()), rel=1e-5), name
        dot, total = dot + float((one * other).sum()), total + float(one.norm() ** 2)
    assert abs(dot / total) < 0.1


def test_permuted_keeps_entries_and_singular_values(prior):
    deltas, control = open_deltas(prior), control_of(prior, "permuted:1")
    for name in prior.tensors:
        one, other = deltas.read(name).float(), whole(control, name).float()
        assert torch.equal(one.flatten().sort().values, other.flatten().sort().values)
        values = torch.linalg.svdvals(one.double()), torch.linalg.svdvals(other.double())
        assert torch.allclose(*values, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_seed_and_name_decide(prior, kind):
    first, second = list(prior.tensors)[:2]
    one, same, other = (control_of(prior, f"{kind}:{seed}") for seed in (1, 1, 2))
    assert torch.equal(whole(one, first), whole(same, first))
    assert not torch.equal(whole(one, first), whole(other, first))
    if kind == "random" and one.matrix(first) == one.matrix(second):
        signs = whole(one, first).sign(), whole(one, second).sign()
        assert not torch.equal(*signs)


@quick
@given(data=st.data())
def test_every_region_is_that_of_the_whole(toy, data):
    kind = data.draw(st.sampled_from(KINDS))
    control = control_of(toy.prior, f"{kind}:7")
    name = data.draw(st.sampled_from(sorted(toy.prior.tensors)))
    expected = whole(control, name)
    rows, cols = (
        tuple(sorted(data.draw(st.tuples(st.integers(0, size), st.integers(0, size)))))
        for size in expected.shape
    )
    out = torch.empty(rows[1] - rows[0], cols[1] - cols[0])
    assert torch.equal(control.block(name, rows, cols, out), expected[slice(*rows), slice(*cols)])
    begin, end = sorted(
        data.draw(st.tuples(*[st.integers(0, expected.numel())] * 2)),
    )
    assert torch.equal(control.flat(name, begin, end), expected.flatten()[begin:end])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rule", ["adaptive_cosine", "sign", "anchor"])
def test_a_rule_uses_the_control_in_place_of_delta(toy, kind, rule):
    model, control = toy.model(), f"{kind}:5"
    handle = drift_merge.attach(model, toy.prior, rule=rule, alpha=0.5, control=control)
    loss_of(model).backward()
    before = {name: p.grad.clone() for name, p in selected(model).items()}
    handle.apply()
    found = control_of(toy.prior, control)
    for name, parameter in selected(model).items():
        delta = whole(found, name).reshape(parameter.shape)
        wanted = biased(rule, before[name], delta, alpha=0.5)
        worst = float((parameter.grad.double() - wanted).abs().max())
        assert worst <= tolerance(parameter.grad, wanted), name
    assert handle.report()["control"] == control
    assert f"control={control}" in handle.describe()


def test_a_control_has_one_prior_and_no_reasoner_to_refresh_from(toy, other_toy):
    with pytest.raises(RecipeError, match="norms of one prior"):
        drift_merge.attach(toy.model(), [toy.prior, other_toy.prior], control="random:0")
    handle = drift_merge.attach(toy.model(), toy.prior, control="random:0")
    with pytest.raises(RecipeError, match="random:0"):
        handle.refresh()
    with pytest.raises(RecipeError, match="control was 'random:0', is 'random:1'"):
        drift_merge.attach(toy.model(), toy.prior, control="random:1", state=handle.state_dict())


@pytest.mark.parametrize("text", ["random", "random:", "random:-1", "shuffled:1", "random:1.5"])
def test_what_is_no_control_is_refused(text):
    with pytest.raises(RecipeError, match="expected random:SEED or permuted:SEED"):
        read_control(text)
