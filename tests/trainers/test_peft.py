"""LoRA through the installed PEFT: its own forward pass says what the projection must be."""

import math

import pytest
import torch
from torch import nn

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from drift_merge.training.lora import directions, find_adapted, require_supported  # noqa: E402
from tests.trainers import tiny  # noqa: E402

pytestmark = [pytest.mark.engines, pytest.mark.filterwarnings("default")]

CONFIGS = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "dora with dropout": {"use_dora": True, "lora_dropout": 0.5},
    "pissa": {"init_lora_weights": "pissa"},
    "mica": {"init_lora_weights": "mica"},
    "bias": {"bias": "lora_only"},
}
TARGETS = ["q_proj", "v_proj", "o_proj", "gate_proj", "down_proj"]


def wrapped(config, model=None):
    """A tiny text model with adapters whose factors are all random, in float64."""
    torch.manual_seed(1)
    values = {"r": 4, "lora_alpha": 6, "target_modules": TARGETS} | config
    base = model if model is not None else tiny.qwen2()
    model = peft.get_peft_model(base, peft.LoraConfig(**values)).double().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:  # PEFT begins with 0, where half of the projection is 0
                parameter.normal_(std=0.1)
    return model


def weight_of(layer):
    """The weight as PEFT's forward pass applies it, differentiable in its factors."""
    zero = torch.zeros(1, layer.in_features, dtype=torch.float64)
    one = torch.eye(layer.in_features, dtype=torch.float64)
    return (layer(one) - layer(zero)).T


def project(adapted, delta):
    matrix = delta.reshape(-1, delta.shape[-1])
    return directions(adapted, lambda first, last: matrix[first:last], 0, matrix.shape[0])


def assert_same(ours, theirs):
    assert len(ours) == len(theirs) > 0
    for one, other in zip(ours, theirs, strict=True):
        limit = 256 * torch.finfo(torch.float64).eps * max(1.0, other.abs().max().item())
        assert one.shape == other.shape
        assert (one - other).abs().max() <= limit


@pytest.mark.parametrize("kind", CONFIGS)
def test_directions_are_the_projection_of_delta_through_pefts_own_forward_pass(kind):
    model = wrapped(CONFIGS[kind])
    found = find_adapted(model)
    assert len(found) == len(TARGETS) * tiny.TEXT["num_hidden_layers"]
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
    for name, adapted in found.items():
        require_supported(adapted)
        assert adapted.shape == tuple(parameters[name].shape)
        assert not parameters[name].requires_grad
        layer = modules[name.removesuffix(".base_layer.weight")]
        delta = torch.randn(adapted.shape, dtype=torch.float64)
        factors = [factor.parameter for factor in adapted.factors]
        expected = torch.autograd.grad((weight_of(layer) * delta).sum(), factors)
        assert_same(project(adapted, delta), expected)


def test_rslora_scales_by_the_root_of_the_rank():
    (adapted, *_) = find_adapted(wrapped({"use_rslora": True})).values()
    assert adapted.adapters[0].scale == 6 / math.sqrt(4)


def test_two_active_adapters_each_get_their_projection():
    model = wrapped({})
    second = peft.LoraConfig(r=2, lora_alpha=3, target_modules=["q_proj"])
    model.add_adapter("second", second)
    model.base_model.set_adapter(["default", "second"])
    model = model.double()
    for name, adapted in find_adapted(model).items():
        assert len(adapted.adapters) == (2 if "q_proj" in name else 1)
        layer = model.get_submodule(name.removesuffix(".base_layer.weight"))
        delta = torch.randn(adapted.shape, dtype=torch.float64)
        factors = [factor.parameter for factor in adapted.factors]
        assert_same(
            project(adapted, delta),
            torch.autograd.grad((weight_of(layer) * delta).sum(), factors, allow_unused=False),
        )


def test_experts_that_are_one_parameter_are_projected_one_by_one():
    config = transformers.Qwen3MoeConfig(
        **tiny.TEXT, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=12
    )
    targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    model = wrapped(
        {"target_modules": [], "target_parameters": targets},
        transformers.Qwen3MoeForCausalLM(config),
    )
    found = find_adapted(model)
    parameters = dict(model.named_parameters())
    assert len(found) == 2 * tiny.TEXT["num_hidden_layers"]
    for name, adapted in found.items():
        assert adapted.shape == tuple(parameters[name].shape)
        layer = adapted.adapters[0].layer
        delta = torch.randn(adapted.shape, dtype=torch.float64)
        factors = [factor.parameter for factor in adapted.factors]
        acting = layer.get_delta_weight("default")
        expected = torch.autograd.grad((acting * delta).sum(), factors)
        assert_same(project(adapted, delta), expected)


def test_an_embedding_with_lora_takes_a_delta_of_its_own_shape():
    model = wrapped({"target_modules": ["embed_tokens"]})
    ((name, adapted),) = find_adapted(model).items()
    assert adapted.shape == (tiny.VOCABULARY, tiny.TEXT["hidden_size"])
    layer = model.get_submodule(name.removesuffix(".base_layer.weight"))
    delta = torch.randn(adapted.shape, dtype=torch.float64)
    delta[tiny.TEXT["pad_token_id"]] = 0  # a row that PyTorch gives no gradient
    out = layer(torch.arange(tiny.VOCABULARY))
    factors = [factor.parameter for factor in adapted.factors]
    assert_same(project(adapted, delta), torch.autograd.grad((out * delta).sum(), factors))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dora", [False, True])
def test_a_weight_packed_by_bitsandbytes_is_projected_with_the_shape_it_acts_with(bits, dora):
    bnb = pytest.importorskip("bitsandbytes")
    linear = nn.Linear(64, 32, bias=False)
    if bits == 4:
        packed = bnb.nn.Linear4bit(64, 32, bias=False, compute_dtype=torch.float32)
    else:
        packed = bnb.nn.Linear8bitLt(64, 32, bias=False, has_fp16_weights=False)
    packed.load_state_dict(linear.state_dict(), strict=False)
    packed = packed.to("cpu")
    model = nn.Module()
    model.q_proj = packed
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], use_dora=dora)
    model = peft.inject_adapter_in_model(config, model)
    layer = model.q_proj
    nn.init.normal_(layer.lora_B["default"].weight, std=0.1)
    before = layer.base_layer.weight.data.clone()
    (adapted,) = find_adapted(model).values()
    assert adapted.name == "q_proj.base_layer.weight"
    assert adapted.shape == (32, 64)
    delta = torch.randn(32, 64)
    factors = [factor.parameter for factor in adapted.factors]
    assert len(factors) == 2 + dora
    ours = directions(adapted, lambda first, last: delta[first:last], 0, 32)
    a, b = factors[:2]
    v = layer.scaling["default"] * b @ a
    if dora:
        from peft.utils.integrations import dequantize_module_weight

        v = v + dequantize_module_weight(layer.base_layer).float()
        v = (factors[2] / v.norm(dim=1).detach())[:, None] * v
    expected = torch.autograd.grad((v * delta).sum(), factors)
    for one, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert torch.equal(layer.base_layer.weight.data, before)
