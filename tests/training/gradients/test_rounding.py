"""Steps that 16-bit parameters round away are measured, and said."""

import pytest
import torch

import drift_merge
from drift_merge.training.gradients.rounding import changeable
from tests.training.toys import loss_of


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("step", [1e-6, 1e-5, 1e-4, 1e-3])
def test_the_fraction_is_that_of_the_weights_that_such_a_step_changes(dtype, step):
    torch.manual_seed(0)
    weights = (torch.randn(20_000) * 0.02).to(dtype)
    moved = (weights.double() + step).to(dtype)
    wanted = float((moved != weights).double().mean())
    assert changeable(weights, step) == pytest.approx(wanted, abs=0.01)


@pytest.mark.parametrize("name", ["AdamW", "Adam"])
def test_a_rate_that_changes_few_weights_is_warned_of_with_the_number(toy, name):
    model = toy.model(torch.bfloat16)
    optimizer = getattr(torch.optim, name)(model.parameters(), lr=1e-6)
    with pytest.warns(UserWarning, match=r"learning rate 1e-06.*for 0\.\d% of the weights") as said:
        drift_merge.attach(model, toy.prior, optimizer=optimizer)
    assert "dtype=torch.float32" in str(said[0].message)


def test_the_peak_of_a_schedule_counts_not_its_first_rate(toy):
    model = toy.model(torch.bfloat16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(step / 10, 1.0))
    assert optimizer.param_groups[0]["lr"] == 0.0
    with pytest.warns(UserWarning, match="learning rate 1e-06"):
        drift_merge.attach(model, toy.prior, optimizer=optimizer)


def test_an_optimizer_that_is_seen_first_at_its_step_is_measured_too(toy):
    model = toy.model(torch.bfloat16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
    handle = drift_merge.attach(model, toy.prior)
    loss_of(model).backward()
    handle.apply()
    with pytest.warns(UserWarning, match="round back"):
        optimizer.step()


@pytest.mark.parametrize(
    ("dtype", "rate", "flag"),
    [(torch.float32, 1e-6, {}), (torch.bfloat16, 1e-2, {}), (torch.bfloat16, 1e-6, {"x": 1})],
    ids=["float32", "large", "stochastic"],
)
def test_what_keeps_its_steps_is_not_warned_of(toy, dtype, rate, flag):
    model = toy.model(dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    if flag:
        optimizer.bf16_stochastic_round = True  # as torchao's
    drift_merge.attach(model, toy.prior, optimizer=optimizer)


def test_an_optimizer_whose_steps_are_not_the_rate_is_not_judged(toy):
    model = toy.model(torch.bfloat16)
    drift_merge.attach(model, toy.prior, optimizer=torch.optim.SGD(model.parameters(), lr=1e-6))
