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
