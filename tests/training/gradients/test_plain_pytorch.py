"""Everything plain PyTorch does between backward and step: equal to the hand-written update."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import drift_merge
from tests.training.naive import biased
from tests.training.toys import loss_of, selected

STEPS = 3


def bias_by_hand(toy, model, rule="adaptive_cosine", scale=1.0):
    """g -= c * delta, from the naive formula, in place."""
    deltas, entries = toy.deltas(), toy.prior.tensors
    for name, parameter in selected(model).items():
        norm = entries[name]["norm_mllm"]
        true = parameter.grad.double() / scale
        parameter.grad.copy_(scale * biased(rule, true, deltas[name], mllm_norm=norm))


def weights_of(model):
    return torch.cat([p.detach().double().flatten() for p in model.parameters()])


def require_close(ours, hand, start):
    """The two runs differ by rounding alone: far less than they have moved."""
    moved = (hand - start).abs().max()
    assert moved > 0
    assert float((ours - hand).abs().max()) <= 2e-4 * float(moved)


def run(toy, train, *, rule="adaptive_cosine"):
    """Train twice, hooked and by hand; `train(model, bias)` builds its optimizer through bias."""
    ours, hand = toy.model(), toy.model()
    start = weights_of(ours)
    handle = train(
        ours, lambda opt: drift_merge.attach(ours, toy.prior, rule=rule, alpha=1.0, optimizer=opt)
    )
    train(hand, None)
    require_close(weights_of(ours), weights_of(hand), start)
    return handle


ADAMW = [{"foreach": True}, {"fused": True}, {"foreach": False}, {"amsgrad": True}]


@pytest.mark.parametrize("options", ADAMW, ids=str)
@pytest.mark.parametrize("rule", ["absolute", "adaptive_cosine"])
def test_foreach_fused_and_single_tensor_adamw(toy, options, rule):
    def train(model, hook):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, **options)
        handle = hook(optimizer) if hook else None
        for step in range(STEPS):
            optimizer.zero_grad()
            loss_of(model, step).backward()
            if not hook:
                bias_by_hand(toy, model, rule)
            optimizer.step()
        return handle

    assert run(toy, train, rule=rule).steps == STEPS


@pytest.mark.parametrize("set_to_none", [True, False])
def test_accumulated_gradients_are_biased_once_per_step(toy, set_to_none):
    def train(model, hook):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        handle = hook(optimizer) if hook else None
        for step in range(STEPS):
            for part in range(4):
                (loss_of(model, 4 * step + part) / 4).backward()
            if not hook:
                bias_by_hand(toy, model)
            optimizer.step()
            optimizer.zero_grad(set_to_none=set_to_none)
        return handle

    assert run(toy, train).steps == STEPS


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing(toy, use_reentrant):
    def train(model, hook):
        tower = model.model.language_model
        tower.checkpointing = lambda layer, x: checkpoint(layer, x, use_reentrant=use_reentrant)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        handle = hook(optimizer) if hook else None
        for step in range(STEPS):
            optimizer.zero_grad()
            loss_of(model, step).backward()
            if not hook:
                bias_by_hand(toy, model)
            optimizer.step()
        return handle

    run(toy, train)


@pytest.mark.parametrize("is_wrapped", [True, False])
def test_a_compiled_model(toy, is_wrapped):
    def train(model, hook):
        compiled = torch.compile(model, backend="aot_eager")
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        handle = None
        if hook:
            target = compiled if is_wrapped else model
            handle = drift_merge.attach(target, toy.prior, optimizer=optimizer)
        for step in range(STEPS):
            optimizer.zero_grad()
            loss_of(compiled, step).backward()
            if not hook:
                bias_by_hand(toy, model)
            optimizer.step()
        return handle

    assert run(toy, train).coverage.units == 20
    torch.compiler.reset()


# torch's own compiler uses what torch deprecates.
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_a_compiled_step_of_the_optimizer(toy):
    def train(model, hook):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        handle = hook(optimizer) if hook else None
        step = torch.compile(optimizer.step, backend="eager")
        for number in range(STEPS):
            optimizer.zero_grad()
            loss_of(model, number).backward()
            if not hook:
                bias_by_hand(toy, model)
            step()
        return handle

    run(toy, train)
    torch.compiler.reset()


def scaled_run(toy, rule, *, unscale, fused):
    def train(model, hook):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=fused)
        handle = hook(optimizer) if hook else None
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=100)
        for step in range(STEPS):
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = loss_of(model, step)
            scaler.scale(loss).backward()
            if unscale or not hook:
                scaler.unscale_(optimizer)
            if not hook:
                bias_by_hand(toy, model, rule)
            scaler.step(optimizer)
            scaler.update()
        return handle

    return run(toy, train, rule=rule)


@pytest.mark.parametrize("rule", ["absolute", "absolute_param_norm", "adaptive_cosine"])
@pytest.mark.parametrize("unscale", [True, False])
@pytest.mark.parametrize("fused", [True, False])
def test_gradscaler_with_and_without_unscale(toy, rule, unscale, fused):
    handle = scaled_run(toy, rule, unscale=unscale, fused=fused)
    assert handle.steps == STEPS
    # A fused optimizer gets scaled gradients; the report is of the true ones all the same.
    other = scaled_run(toy, rule, unscale=True, fused=False)
    assert handle.report()["bias_ratio"] == pytest.approx(other.report()["bias_ratio"], rel=1e-3)


@pytest.mark.parametrize("fused", [True, False])
def test_a_step_that_gradscaler_skips_does_not_count(toy, fused):
    model = toy.model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=fused)
    seen = []

    def schedule(step):
        seen.append(step)
        return 1.0

    handle = drift_merge.attach(model, toy.prior, optimizer=optimizer, schedule=schedule)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    before = weights_of(model)
    for is_bad in (True, False, True, False):
        optimizer.zero_grad()
        scaler.scale(loss_of(model)).backward()
        if is_bad:
            selected(model)["layers.0.mlp.up_proj.weight"].grad[0, 0] = float("inf")
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(weights_of(model), before) == is_bad
        before = weights_of(model)
    assert handle.steps == 2
    assert max(seen) == 1


def test_clipping_before_the_step_comes_before_the_bias(toy):
    model = toy.model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    drift_merge.attach(model, toy.prior, rule="gradnorm", optimizer=optimizer)
    loss_of(model).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    before = {name: float(p.grad.norm()) for name, p in selected(model).items()}
    optimizer.step()
    for name, parameter in selected(model).items():
        assert float(parameter.grad.norm()) <= 2 * before[name] * (1 + 1e-5)


def test_tied_weights_are_biased_once(toy, tmp_path):
    from tests.training.toys import make_toy

    tied = make_toy(tmp_path, modules="embed,head")
    model = tied.model()
    model.lm_head.weight = model.model.language_model.embed_tokens.weight
    handle = drift_merge.attach(
        model, tied.prior, modules="embed,head", rule="absolute", alpha=1.0, strict=True
    )
    loss_of(model).backward()
    weight = model.model.language_model.embed_tokens.weight
    before = weight.grad.clone()
    handle.apply()
    wanted = before - tied.deltas()["embed_tokens.weight"]
    assert torch.allclose(weight.grad, wanted, atol=1e-6)
    assert handle.coverage.tied == ("lm_head.weight",)
    assert handle.coverage.units == 1


def test_gradients_with_other_strides_are_biased(toy):
    model = toy.model()
    handle = drift_merge.attach(model, toy.prior, rule="absolute", alpha=1.0)
    loss_of(model).backward()
    parameter = selected(model)["layers.0.mlp.up_proj.weight"]
    before = parameter.grad.clone()
    parameter.grad = parameter.grad.t().contiguous().t()
    assert not parameter.grad.is_contiguous()
    handle.apply()
    wanted = before - toy.deltas()["layers.0.mlp.up_proj.weight"]
    assert torch.allclose(parameter.grad, wanted, atol=1e-6)


def test_gradients_that_are_part_of_a_graph_are_biased(toy):
    model = toy.model()
    handle = drift_merge.attach(model, toy.prior, rule="absolute", alpha=1.0)
    parameters = list(selected(model).values())
    found = torch.autograd.grad(loss_of(model), parameters, create_graph=True)
    for parameter, gradient in zip(parameters, found, strict=True):
        parameter.grad = gradient.clone()
    before = parameters[0].grad.detach().clone()
    handle.apply()
    assert not torch.equal(parameters[0].grad.detach(), before)
