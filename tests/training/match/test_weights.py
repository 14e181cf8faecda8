"""A prior for other weights is refused: by fingerprint, norm or values."""

import pytest
import torch

import drift_merge
from drift_merge.errors import VerificationError
from tests.training.toys import fuse, holder, loss_of, make_toy, memory_tensors, selected

LIVE = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("stored", ["F32", "BF16", "F16"])
@pytest.mark.parametrize("live", LIVE, ids=str)
def test_the_weights_of_the_prior_pass_in_every_dtype(tmp_path, stored, live):
    toy = make_toy(tmp_path, stored=stored)
    drift_merge.attach(toy.model(live), toy.prior)


@pytest.mark.parametrize("stored", ["F32", "BF16"])
@pytest.mark.parametrize("live", LIVE, ids=str)
def test_other_weights_are_refused_in_every_dtype(tmp_path, stored, live):
    toy = make_toy(tmp_path / "one", stored=stored)
    other = make_toy(tmp_path / "two", stored=stored, seed=3)
    with pytest.raises(VerificationError, match="20 of 20 tensors differ") as error:
        drift_merge.attach(other.model(live), toy.prior)
    assert "layers.0.mlp.down_proj.weight" in error.value.message
    assert "... 17 more" in error.value.message
    assert "state=" in error.value.remedy
    assert f"drift-prior compute {toy.pair.reasoner} MLLM" in error.value.remedy


def test_one_changed_value_is_found_where_bytes_can_be_compared(toy):
    model = toy.model()
    with torch.no_grad():
        weight = selected(model)["layers.1.self_attn.k_proj.weight"]
        weight[3, 3] = torch.nextafter(weight[3, 3], torch.tensor(9.0))
    with pytest.raises(
        VerificationError, match=r"1 of 20 tensors differ\.\n.*layers\.1\.self_attn\.k"
    ):
        drift_merge.attach(model, toy.prior)


def test_weights_of_the_same_norm_are_told_by_their_values(toy):
    model = toy.model(torch.bfloat16)
    with torch.no_grad():
        weight = selected(model)["layers.0.mlp.up_proj.weight"]
        weight.copy_(weight.flip(0))
    with pytest.raises(VerificationError, match="recorded values are others"):
        drift_merge.attach(model, toy.prior)


def test_a_scaled_weight_is_told_by_its_norm_where_no_values_are_recorded(toy, monkeypatch):
    for entry in toy.prior.tensors.values():
        monkeypatch.delitem(entry, "sample_mllm")
        monkeypatch.delitem(entry, "dtype_mllm")
    drift_merge.attach(toy.model(), toy.prior)  # format of an older version
    model = toy.model(torch.bfloat16)
    with torch.no_grad():
        selected(model)["layers.0.mlp.up_proj.weight"].mul_(1.1)
    with pytest.raises(VerificationError, match=r"\|theta\| is .*, recorded"):
        drift_merge.attach(model, toy.prior)


@pytest.mark.parametrize("stored", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("loaded", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("live", [torch.float32, torch.float64], ids=str)
def test_weights_loaded_in_16_bits_and_widened_pass_and_that_is_said(
    tmp_path, stored, loaded, live
):
    toy = make_toy(tmp_path, stored=stored)
    model, exact = toy.model(loaded).to(live), toy.model()
    pairs = zip(selected(model).values(), selected(exact).values(), strict=True)
    if all(torch.equal(one.float(), other) for one, other in pairs):
        drift_merge.attach(model, toy.prior)  # nothing was lost, nothing is said
        return
    word = str(loaded).removeprefix("torch.")
    with pytest.warns(UserWarning, match=rf"widened \(\d+ in {word}, of 20 tensors\)"):
        drift_merge.attach(model, toy.prior)


@pytest.mark.parametrize("stored", ["F32", "F16"])
def test_other_weights_that_were_widened_are_refused_all_the_same(tmp_path, stored):
    toy = make_toy(tmp_path / "one", stored=stored)
    other = make_toy(tmp_path / "two", stored=stored, seed=3)
    with pytest.raises(VerificationError, match="20 of 20 tensors differ"):
        drift_merge.attach(other.model(torch.bfloat16).float(), toy.prior)
    model = toy.model(torch.bfloat16).float()
    with torch.no_grad():
        selected(model)["layers.0.mlp.up_proj.weight"].mul_(1.5)
    with pytest.raises(VerificationError, match=r"1 of 20 tensors differ\.\n.*up_proj"):
        drift_merge.attach(model, toy.prior)


def test_float32_weights_a_little_off_are_not_taken_for_widened_ones(toy):
    model = toy.model()
    with torch.no_grad():
        for weight in selected(model).values():
            weight.mul_(1.0005)  # within the rounding of bfloat16, but no value of it
    with pytest.raises(VerificationError, match="20 of 20 tensors differ"):
        drift_merge.attach(model, toy.prior)


def test_other_weights_warn_if_not_strict(toy, other_toy):
    with pytest.warns(UserWarning, match="20 of 20 tensors differ"):
        drift_merge.attach(other_toy.model(), toy.prior, strict=False)


def test_what_is_not_selected_may_differ(toy):
    model = toy.model()
    with torch.no_grad():
        model.lm_head.weight.add_(1.0)
        selected(model)["layers.0.mlp.up_proj.weight"].add_(1.0)
    assert drift_merge.attach(model, toy.prior, modules="attn").coverage.units == 14


def test_a_resumed_run_is_not_refused_for_its_trained_weights(toy):
    model = toy.model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle = drift_merge.attach(model, toy.prior, optimizer=optimizer)
    loss_of(model).backward()
    optimizer.step()
    handle.remove()
    with pytest.raises(VerificationError):
        drift_merge.attach(model, toy.prior)
    assert drift_merge.attach(model, toy.prior, state=handle.state_dict()).steps == 1


def test_fused_weights_are_checked_tensor_by_tensor(toy):

    tensors = fuse(memory_tensors(toy.pair.mllm))
    drift_merge.attach(holder(tensors), toy.prior)
    name = "model.language_model.layers.0.self_attn.qkv_proj.weight"
    tensors[name] = tensors[name].flip(0).contiguous()
    with pytest.raises(VerificationError, match="3 of 20 tensors differ"):
        drift_merge.attach(holder(tensors), toy.prior)
