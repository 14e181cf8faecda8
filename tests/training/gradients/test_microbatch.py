"""when="microbatch": the reference's hooks, formula for formula."""

import pytest
import torch

import drift_merge
from drift_merge.errors import RecipeError
from tests.training.naive import RULES, biased
from tests.training.toys import loss_of, selected

STEPS, PARTS = 3, 2


def reference_hooks(toy, model, rule):
    """What the reference code does: a hook on every parameter, in float64 here."""
    deltas, entries = toy.deltas(), toy.prior.tensors
    for name, parameter in selected(model).items():
        norm = entries[name]["norm_mllm"]  # normalize_delta_to_param: at the start, per tensor
        delta, begin = deltas[name], parameter.detach().clone()

        def hook(g, d=delta, n=norm, p=parameter, b=begin):
            left = d + b - p.detach() if rule == "anchor" else d
            return biased(rule, g, left, mllm_norm=n).to(g.dtype)

        parameter.register_hook(hook)


@pytest.mark.parametrize("rule", RULES)
def test_every_step_equals_that_of_the_reference_formula(toy, rule):
    ours, theirs = toy.model(), toy.model()
    drift_merge.attach(ours, toy.prior, rule=rule, alpha=1.0, when="microbatch")
    reference_hooks(toy, theirs, rule)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.05) for m in (ours, theirs)]
    for step in range(STEPS):
        for model, optimizer in zip((ours, theirs), optimizers, strict=True):
            optimizer.zero_grad()
            for part in range(PARTS):
                (loss_of(model, PARTS * step + part) / PARTS).backward()
        pairs = zip(selected(ours).items(), selected(theirs).values(), strict=True)
        for (name, one), other in pairs:
            worst = (one.grad - other.grad).abs().max()
            assert worst <= 1e-5 * other.grad.abs().max(), (step, name)
        for optimizer in optimizers:
            optimizer.step()


@pytest.mark.filterwarnings("ignore:19 of 20 tensors have no gradient")
def test_the_bias_of_noise_is_stronger_than_once_per_step(toy):
    """By about the square root of the number of micro-batches."""
    parts, ratios = 16, {}
    for when in ("step", "microbatch"):
        model = toy.model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        handle = drift_merge.attach(
            model, toy.prior, rule="gradnorm", when=when, optimizer=optimizer
        )
        parameter = selected(model)["layers.0.mlp.up_proj.weight"]
        generator = torch.Generator().manual_seed(0)
        plain = torch.zeros_like(parameter)
        for _ in range(parts):
            noise = torch.randn(parameter.shape, generator=generator)
            plain += noise
            (parameter * noise).sum().backward()
        optimizer.step()
        ratios[when] = float((parameter.grad - plain).norm() / plain.norm())
        assert handle.steps == 1
    assert ratios["step"] == pytest.approx(1.0, rel=1e-4)
    assert 0.7 * parts**0.5 < ratios["microbatch"] < 1.3 * parts**0.5


def test_remove_takes_every_hook_away(toy):
    model = toy.model()
    handle = drift_merge.attach(model, toy.prior, when="microbatch")
    handle.remove()
    other = toy.model()
    loss_of(model).backward()
    loss_of(other).backward()
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert (one.grad is None and two.grad is None) or torch.equal(one.grad, two.grad)


def test_apply_is_refused(toy):
    handle = drift_merge.attach(toy.model(), toy.prior, when="microbatch")
    with pytest.raises(RecipeError, match="every backward"):
        handle.apply()


def test_a_schedule_needs_the_optimizer_that_counts_the_steps(toy):
    model = toy.model()
    options = {
        "when": "microbatch",
        "schedule": "linear",
        "total_steps": 2,
        "rule": "absolute",
        "alpha": 1.0,
    }
    with pytest.raises(RecipeError, match="must know the steps"):
        drift_merge.attach(model, toy.prior, **options)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    handle = drift_merge.attach(model, toy.prior, optimizer=optimizer, **options)
    seen = []
    for step in range(3):
        loss_of(model, step).backward()
        seen.append(handle.report()["coefficient"])
        optimizer.step()
    assert seen == pytest.approx([1.0, 0.5, 0.0])


def test_sharded_parameters_are_refused_with_the_reason(toy):
    model = toy.model()
    for parameter in selected(model).values():
        parameter.ds_id = 0
        parameter.ds_shape = parameter.shape
    from drift_merge.training.gradients.layout import PlainLayout
    from drift_merge.training.gradients.microbatch import require_hookable
    from drift_merge.training.match.matching import match

    shapes = {n: tuple(e["shape"]) for n, e in toy.prior.tensors.items()}
    with pytest.raises(RecipeError, match="ZeRO-3"):
        require_hookable(match(model, shapes).units, PlainLayout())
