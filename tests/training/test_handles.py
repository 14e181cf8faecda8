"""Several handles, dropped ones, copies, and runs that are taken up again."""

import copy
import gc
import io
import weakref

import pytest
import torch
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

import drift_merge
from drift_merge.errors import RecipeError, VerificationError
from tests.training.toys import selected, sgd, step


def test_a_second_handle_of_the_same_prior_is_refused(toy, other_toy):
    model = toy.model()
    optimizer = sgd(model.parameters())
    handle = drift_merge.attach(model, toy.prior, optimizer=optimizer)
    for prior in (toy.prior, [other_toy.prior, toy.prior]):
        with pytest.raises(RecipeError, match="biased by this prior already"):
            drift_merge.attach(model, prior, optimizer=optimizer, strict=False)
    handle.remove()
    drift_merge.attach(model, toy.prior, optimizer=optimizer).remove()


def test_other_modules_and_other_priors_may_have_handles_of_their_own(toy, other_toy):
    model = toy.model()
    optimizer = sgd(model.parameters())
    handles = [
        drift_merge.attach(model, toy.prior, modules="attn", optimizer=optimizer),
        drift_merge.attach(model, toy.prior, modules="mlp", optimizer=optimizer),
    ]
    with pytest.warns(UserWarning, match="tensors differ"):
        handles.append(
            drift_merge.attach(model, other_toy.prior, optimizer=optimizer, strict=False)
        )
    step(model, optimizer)
    assert [handle.steps for handle in handles] == [1, 1, 1]


@pytest.mark.parametrize("is_hooked", [False, True])
def test_a_step_after_the_handle_was_dropped_is_an_error(toy, is_hooked):
    model = toy.model()
    options = {"optimizer": sgd(model.parameters())} if is_hooked else {}
    gone = weakref.ref(drift_merge.attach(model, toy.prior, **options))
    options.clear()  # with the optimizer goes its hook
    if is_hooked:  # each holds the other
        gc.collect()
    assert gone() is None
    with pytest.raises(RecipeError, match="was dropped") as caught:
        step(model, sgd(model.parameters()))
    assert "attach(model, prior).remove()" in caught.value.remedy
    model = toy.model()
    drift_merge.attach(model, toy.prior)
    drift_merge.attach(model, toy.prior).remove()
    step(model, sgd(model.parameters()))


def test_a_model_whose_handle_was_dropped_goes_at_once(toy):
    model = toy.model()
    drift_merge.attach(model, toy.prior)
    parameter, layer = next(model.parameters()), weakref.ref(model)
    guard = weakref.ref(selected(model)["layers.0.mlp.up_proj.weight"]._drift_merge_claims[0].guard)
    del parameter, model
    assert layer() is None
    assert guard() is None


def test_many_dropped_handles_leave_one_hook(toy):
    from torch.optim.optimizer import _global_optimizer_post_hooks as hooks

    gc.collect()
    handle = drift_merge.attach(toy.model(), toy.prior)  # forgets those of dead ones
    before = len(hooks)
    for _ in range(5):
        drift_merge.attach(toy.model(), toy.prior)
    assert len(hooks) <= before + 1
    handle.remove()


def test_a_model_with_a_handle_can_be_copied_and_saved(toy):
    model = toy.model()
    drift_merge.attach(model, toy.prior, optimizer=sgd(model.parameters()))
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for twin in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        drift_merge.attach(twin, toy.prior)  # the copy is nobody's


def language_model(toy):
    """DCP wants a state for all that is trained, and the vision tower is not used here."""
    model = toy.model()
    model.model.visual.requires_grad_(False)
    return model


def run(toy, steps):
    model = language_model(toy)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    handle = drift_merge.attach(model, toy.prior, rule="absolute", alpha=1.0, optimizer=optimizer)
    for seed in steps:
        step(model, optimizer, seed=seed)
    return model, optimizer, handle


@pytest.mark.parametrize("is_attached_first", [True, False])
def test_a_resumed_run_is_exact_in_both_orders(toy, is_attached_first):
    whole, _, whole_handle = run(toy, range(4))
    model, optimizer, handle = run(toy, range(2))
    saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer))
    state, weights = handle.state_dict(), copy.deepcopy(model.state_dict())
    again = language_model(toy)
    again.load_state_dict(weights)
    fresh = torch.optim.AdamW(again.parameters(), lr=1e-2)
    if not is_attached_first:
        set_optimizer_state_dict(again, fresh, saved)
    resumed = drift_merge.attach(
        again, toy.prior, rule="absolute", alpha=1.0, optimizer=fresh, state=state
    )
    if is_attached_first:
        set_optimizer_state_dict(again, fresh, saved)
    assert resumed.steps == 2
    for seed in range(2, 4):
        step(again, fresh, seed=seed)
    assert resumed.steps == whole_handle.steps == 4
    for one, other in zip(whole.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("is_hooked", [True, False])
def test_a_checkpoint_before_the_first_step_has_no_moments_of_the_prior(toy, is_hooked):
    model = toy.model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    options = {"optimizer": optimizer} if is_hooked else {}
    handle = drift_merge.attach(model, toy.prior, rule="absolute", alpha=1.0, **options)
    saved = get_optimizer_state_dict(model, optimizer)["state"]
    assert saved
    assert not any(values["exp_avg"].any() for values in saved.values())
    assert handle.steps == 0


def test_a_first_step_of_a_warm_up_at_rate_0_counts(toy):
    model = toy.model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    handle = drift_merge.attach(model, toy.prior, optimizer=optimizer)
    step(model, optimizer)
    assert handle.steps == 1


def test_a_resumed_run_whose_weights_were_not_loaded_is_refused_at_its_first_step(toy):
    _, _, handle = run(toy, range(1))
    model = toy.model()
    optimizer = sgd(model.parameters())
    options = {
        "rule": "absolute",
        "alpha": 1.0,
        "optimizer": optimizer,
        "state": handle.state_dict(),
    }
    again = drift_merge.attach(model, toy.prior, **options)
    with pytest.raises(VerificationError, match=r"resumes after 1 steps.*were not loaded"):
        step(model, optimizer)
    again.remove()
    drift_merge.attach(model, toy.prior, strict=False, **options)
    with pytest.warns(UserWarning, match="were not loaded"):
        step(model, optimizer)
