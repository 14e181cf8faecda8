"""Adapters through attach(): the joint coefficient, fused weights, what is reported."""

import pytest
import torch
from torch import nn

import drift_merge
from drift_merge.errors import RecipeError
from tests.training.lora.layers import ToyLora
from tests.training.naive import RULES, biased
from tests.training.toys import make_toy, memory_tensors

AT = "model.language_model.layers.0."
PATHS = (f"{AT}self_attn.q_proj", f"{AT}self_attn.k_proj", f"{AT}mlp.up_proj")


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """Without biases: `ToyLora` has none."""
    return make_toy(tmp_path_factory.mktemp("lora"), modules="re:proj.weight")


def adapted_model(toy, paths=PATHS):
    """Everything frozen; the weights at `paths` behind adapters, their names as PEFT's."""
    root = nn.Module()
    for name, values in memory_tensors(toy.pair.mllm).items():
        path, _, leaf = name.rpartition(".")
        module = root
        for part in path.split("."):
            if part not in module._modules:
                module.add_module(part, nn.Module())
            module = module._modules[part]
        parameter = nn.Parameter(values.double(), requires_grad=False)
        module.register_parameter(leaf, parameter)
    for number, path in enumerate(paths):
        parent, _, leaf = path.rpartition(".")
        holder = root.get_submodule(parent)
        weight = holder.get_submodule(leaf).weight
        layer = ToyLora(*weight.shape, seed=number)
        layer.base_layer.weight = weight
        setattr(holder, leaf, layer)
    return root


def factors(model, path):
    layer = model.get_submodule(path)
    return layer.lora_A["default"].weight, layer.lora_B["default"].weight, layer.scaling["default"]


def give_gradients(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)


def joined(a, b):
    return torch.cat([a.flatten(), b.flatten()])


@pytest.mark.parametrize("rule", [rule for rule in RULES if rule != "anchor"])
def test_the_factors_share_one_coefficient(plain, rule):
    model = adapted_model(plain)
    handle = drift_merge.attach(model, plain.prior, rule=rule, alpha=1.0, modules="re:proj.weight")
    give_gradients(model)
    wanted = {}
    for path in PATHS:
        a, b, scale = factors(model, path)
        name = f"layers.0.{path.removeprefix(AT)}.weight"
        delta = plain.deltas()[name].double()
        direction = joined(scale * b.T @ delta, scale * delta @ a.T).detach()
        # absolute_param_norm is the projection of delta * |theta| / |delta|.
        share = float(direction.norm() / delta.norm())
        norm = plain.prior.tensors[name]["norm_mllm"] * share
        wanted[path] = biased(rule, joined(a.grad, b.grad), direction, mllm_norm=norm)
    handle.apply()
    for path in PATHS:
        a, b, _ = factors(model, path)
        assert torch.allclose(joined(a.grad, b.grad), wanted[path], rtol=1e-5, atol=1e-6), path
    assert handle.coverage.units == 3
    assert len(handle.coverage.frozen) == 11
    assert handle.report()["missing_gradients"]["count"] == 0


def test_descent_by_the_prior_alone_shortens_the_distance(plain):
    model = adapted_model(plain)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.05)
    handle = drift_merge.attach(
        model,
        plain.prior,
        rule="absolute",
        alpha=1.0,
        modules="re:proj.weight",
        optimizer=optimizer,
    )
    assert handle.report()["distance"] == 0.0
    for _ in range(3):
        for parameter in trained:
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
    figures = handle.report()
    assert figures["distance"] > 0
    name = "layers.0.mlp.up_proj.weight"
    a, b, scale = factors(model, f"{AT}mlp.up_proj")
    start = adapted_model(plain)
    a0, b0, _ = factors(start, f"{AT}mlp.up_proj")
    delta = plain.deltas()[name].double()
    moved = ((scale * (b @ a - b0 @ a0)).detach() * delta).sum() / (delta * delta).sum()
    assert figures["tensors"][name]["distance"] == pytest.approx(float(moved), rel=1e-4)


def test_a_fused_weight_is_biased_by_all_its_tensors_at_once(plain):
    """q, k and v move the same factors; no one sees gradients that another has biased."""
    split = memory_tensors(plain.pair.mllm)
    names = [f"{AT}self_attn.{x}_proj.weight" for x in "qkv"]
    fused = torch.cat([split[name] for name in names])
    model = adapted_model(plain, paths=())
    attention = model.get_submodule(f"{AT}self_attn")
    for x in "qkv":
        delattr(attention, f"{x}_proj")
    layer = ToyLora(*fused.shape, seed=3)
    layer.base_layer.weight = nn.Parameter(fused.double(), requires_grad=False)
    attention.qkv_proj = layer
    handle = drift_merge.attach(
        model, plain.prior, rule="gradnorm", modules="re:proj.weight", layers="0"
    )
    assert handle.coverage.units == 3
    give_gradients(model)
    a, b, scale = factors(model, f"{AT}self_attn.qkv_proj")
    before, wanted, row = joined(a.grad, b.grad), joined(a.grad, b.grad), 0
    for x in "qkv":
        delta = plain.deltas()[f"layers.0.self_attn.{x}_proj.weight"].double()
        padded = torch.zeros(fused.shape, dtype=torch.float64)
        padded[row : row + delta.shape[0]] = delta
        row += delta.shape[0]
        direction = joined(scale * b.T @ padded, scale * padded @ a.T).detach()
        wanted = wanted + biased("gradnorm", before, direction) - before
    handle.apply()
    assert torch.allclose(joined(a.grad, b.grad), wanted, rtol=1e-5, atol=1e-6)


def test_microbatch_and_refresh_are_refused_with_adapters(plain):
    options = {"modules": "re:proj.weight"}
    with pytest.raises(RecipeError, match="LoRA trains factors"):
        drift_merge.attach(adapted_model(plain), plain.prior, when="microbatch", **options)
    handle = drift_merge.attach(adapted_model(plain), plain.prior, **options)
    with pytest.raises(RecipeError, match="3 of them are trained through adapters"):
        handle.refresh()


def test_anchor_is_refused_with_adapters_by_name(plain):
    with pytest.raises(RecipeError, match="rule='anchor' needs the weights themselves"):
        drift_merge.attach(
            adapted_model(plain), plain.prior, rule="anchor", modules="re:proj.weight"
        )


def test_until_stops_the_factors_of_a_weight_that_has_arrived(plain):
    model = adapted_model(plain)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    handle = drift_merge.attach(
        model,
        plain.prior,
        rule="absolute",
        alpha=1.0,
        until=0.02,
        modules="re:proj.weight",
        optimizer=optimizer,
    )
    for _ in range(40):
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
    report = handle.report()
    assert report["arrived"]["count"] == len(report["tensors"])
    assert all(0.02 <= one["distance"] < 0.2 for one in report["tensors"].values())


def test_an_optimizer_without_the_factors_is_refused(plain):
    model = adapted_model(plain)
    layer = model.get_submodule(f"{AT}mlp.up_proj")
    optimizer = torch.optim.SGD(layer.lora_A.parameters(), lr=0.1)
    with pytest.raises(RecipeError, match="does not hold 5 of the 6 parameters"):
        drift_merge.attach(model, plain.prior, modules="re:proj.weight", optimizer=optimizer)


def test_missing_gradients_of_factors_are_named(plain):
    model = adapted_model(plain)
    handle = drift_merge.attach(model, plain.prior, modules="re:proj.weight")
    give_gradients(model)
    a, b, _ = factors(model, f"{AT}mlp.up_proj")
    a.grad = b.grad = None
    handle.apply()
    missing = handle.report()["missing_gradients"]
    assert missing["names"] == [
        f"{AT}mlp.up_proj.lora_A.default.weight",
        f"{AT}mlp.up_proj.lora_B.default.weight",
    ]


def test_the_base_weights_are_checked(plain):
    model = adapted_model(plain)
    with torch.no_grad():
        model.get_submodule(f"{AT}mlp.up_proj").base_layer.weight.mul_(1.5)
    with pytest.raises(drift_merge.VerificationError, match=r"1 of 3 tensors differ"):
        drift_merge.attach(model, plain.prior, modules="re:proj.weight")


def test_two_priors_combine_before_the_projection(plain, tmp_path):
    other = make_toy(tmp_path, seed=7, modules="re:proj.weight")
    model = adapted_model(plain)
    handle = drift_merge.attach(
        model,
        [plain.prior, other.prior],
        weights=[1.0, 0.5],
        rule="absolute",
        alpha=1.0,
        modules="re:proj.weight",
    )
    give_gradients(model)
    path, name = f"{AT}mlp.up_proj", "layers.0.mlp.up_proj.weight"
    a, b, scale = factors(model, path)
    before = b.grad.clone()
    handle.apply()
    delta = plain.deltas()[name].double() + 0.5 * other.deltas()[name].double()
    assert torch.allclose(b.grad, before - scale * delta @ a.T, rtol=1e-5, atol=1e-6)
