"""What a handle reports: figures of the last step, and the way travelled to the reasoner."""

import json

import pytest
import torch

import drift_merge
from drift_merge.errors import RecipeError
from tests.runs import as_tensor
from tests.training import toys
from tests.training.toys import loss_of, selected

FIGURES = ("cosine", "bias_ratio", "coefficient", "distance")


def by_hand(toy, names, gradients):
    g = torch.cat([gradients[n].double().flatten() for n in names])
    d = torch.cat([toy.deltas()[n].double().flatten() for n in names])
    return float(g @ d / (g.norm() * d.norm())), float(0.5 * d.norm() / g.norm())


def test_figures_are_those_of_the_last_step(toy):
    model = toy.model()
    handle = drift_merge.attach(model, toy.prior, rule="absolute", alpha=0.5)
    loss_of(model).backward()
    gradients = {n: p.grad.clone() for n, p in selected(model).items()}
    handle.apply()
    report = handle.report()
    groups = {
        "attn": [n for n in gradients if "attn" in n],
        "mlp": [n for n in gradients if "mlp" in n],
    }
    for figures, names in (
        (report, list(gradients)),
        *((report["modules"][m], names) for m, names in groups.items()),
        *((report["tensors"][n], [n]) for n in gradients),
    ):
        cosine, ratio = by_hand(toy, names, gradients)
        assert figures["cosine"] == pytest.approx(cosine, rel=1e-4, abs=1e-7)
        assert figures["bias_ratio"] == pytest.approx(ratio, rel=1e-5)
        assert figures["coefficient"] == pytest.approx(0.5)
        assert figures["distance"] == 0.0
    assert report["coverage"]["units"] == 20
    assert report["missing_gradients"] == {"count": 0, "names": []}
    assert json.loads(json.dumps(report)) == json.loads(json.dumps(report))


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_distance_is_the_share_of_the_way_to_the_reasoner(toy, share):
    model = toy.model()
    handle = drift_merge.attach(model, toy.prior)
    deltas = toy.deltas()
    with torch.no_grad():
        for name, parameter in selected(model).items():
            parameter.add_(share * deltas[name])
    report = handle.report()
    assert report["distance"] == pytest.approx(share, abs=1e-5)
    assert report["modules"]["attn"]["distance"] == pytest.approx(share, abs=1e-5)


def test_the_reasoner_itself_is_at_distance_one(toy):
    model = toy.model()
    handle = drift_merge.attach(model, toy.prior)
    reasoner = toys.memory_tensors(toy.pair.reasoner)
    model.load_state_dict(reasoner, strict=False)
    assert handle.report()["distance"] == pytest.approx(1.0, abs=1e-5)


def test_before_the_first_step_there_are_no_figures_of_gradients(toy):
    report = drift_merge.attach(toy.model(), toy.prior).report()
    assert report["cosine"] is None
    assert report["bias_ratio"] is None
    assert report["distance"] == 0.0
    assert report["steps"] == 0


def test_metrics_are_flat_and_finite(toy):
    model = toy.model()
    handle = drift_merge.attach(model, toy.prior, alpha={"attn": 1.0, "mlp": 0.5})
    loss_of(model).backward()
    handle.apply()
    metrics = handle.metrics()
    wanted = {f"drift/{f}" for f in FIGURES} | {"drift/alpha", "drift/missing_gradients"}
    wanted.add("drift/arrived")
    for module in ("attn", "mlp"):
        wanted |= {f"drift/{module}/{f}" for f in (*FIGURES, "alpha")}
    assert set(metrics) == wanted
    assert all(type(value) is float for value in metrics.values())
    assert (metrics["drift/attn/alpha"], metrics["drift/mlp/alpha"]) == (1.0, 0.5)


def test_a_removed_handle_reports_no_more(toy):
    handle = drift_merge.attach(toy.model(), toy.prior)
    handle.remove()
    with pytest.raises(RecipeError, match="removed"):
        handle.report()


def test_adaptive_cosine_is_about_half_of_gradnorm_at_random(toy):
    """The control of the reference: at cos near 0 the bias ratio is one half."""
    model = toy.model()
    handle = drift_merge.attach(model, toy.prior)
    generator = torch.Generator().manual_seed(0)
    for parameter in selected(model).values():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    handle.apply()
    figures = handle.report()["tensors"]["layers.0.mlp.up_proj.weight"]
    assert figures["bias_ratio"] == pytest.approx((1 + figures["cosine"]) / 2, rel=1e-5)


def test_a_stored_tensor_is_not_held_twice(toy):
    """The delta that is used is the one on the disk."""
    from tests import checkpoints as c

    stored = {n: as_tensor(t) for n, t in c.read_tensors(toy.prior.path).items()}
    assert {n: tuple(t.shape) for n, t in stored.items()} == {
        n: tuple(e["shape"]) for n, e in toy.prior.tensors.items()
    }
