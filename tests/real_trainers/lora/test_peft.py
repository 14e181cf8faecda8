"""LoRA through the installed PEFT: its own forward pass says what the projection must be."""

import math

import pytest
import torch
from torch import nn

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

import drift_merge  # noqa: E402
from drift_merge.training.lora.directions import directions  # noqa: E402
from drift_merge.training.lora.layers import find_adapted, require_supported  # noqa: E402
from tests import tiny_models  # noqa: E402
from tests.real_trainers import tiny  # noqa: E402

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
    base = model if model is not None else tiny_models.qwen2(tiny.TEXT)
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


@pytest.fixture(scope="module")
def setup(tmp_path_factory):
    return tiny.make_setup("llava", tmp_path_factory.mktemp("llava"))


RULES = ("absolute", "absolute_param_norm", "gradnorm", "adaptive_cosine")


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("kind", ["lora", "rslora", "dora"])
def test_attach_biases_the_factors_of_an_mllm_as_written_by_hand(setup, kind, rule):
    model = tiny.with_lora(setup, torch.float64, **CONFIGS[kind])
    batch = {
        key: value.double() if value.is_floating_point() else value
        for key, value in setup.collate(setup.samples(2)).items()
    }
    gradients = tiny.gradients_of(model, [batch])
    expected = tiny.biased_factors(model, gradients, setup, rule, alpha=0.7)
    handle = drift_merge.attach(model, setup.prior, rule=rule, alpha=0.7)
    for name, parameter in model.named_parameters():
        parameter.grad = gradients[name].clone() if name in gradients else None
    handle.apply()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        scale = max(1.0, expected[name].abs().max().item())
        # The norms that the prior records were summed in float32.
        limit = 1e-6 if rule == "absolute_param_norm" else 1e-12
        assert (gradient - expected[name]).abs().max().item() <= limit * scale, name
    assert handle.metrics()["drift/bias_ratio"] > 0


def test_what_lora_does_not_train_is_counted_as_frozen(setup):
    handle = drift_merge.attach(tiny.with_lora(setup), setup.prior)
    coverage = handle.coverage
    assert coverage.matched == coverage.selected == 14  # attention and mlp of two layers
    assert len(coverage.frozen) == 8  # k, o, gate and up have no adapter
    assert coverage.units == 6


def test_at_pefts_start_with_b_zero_every_rule_is_finite(setup):
    for rule in RULES:
        model = tiny.with_lora(setup)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.zeros_(parameter)
        optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
        drift_merge.attach(model, setup.prior, rule=rule, alpha=1.0, optimizer=optimizer)
        before = {n: p.detach().clone() for n, p in model.named_parameters() if "lora_A" in n}
        for _ in range(2):  # A moves from the second step on
            model(**setup.collate(setup.samples(2))).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        for name, parameter in model.named_parameters():
            assert parameter.isfinite().all()
            if name in before:
                assert not torch.equal(parameter, before[name])


def test_descent_with_the_prior_alone_moves_an_adapter_towards_the_reasoner(setup):
    model = tiny.with_lora(setup, torch.float64)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    handle = drift_merge.attach(model, setup.prior, rule="absolute", alpha=1.0, optimizer=optimizer)
    layers = tiny.lora_layers(model)

    def distance():
        return sum(
            float((tiny.acting_weight(layer).detach() * setup.deltas[name]).sum())
            for name, (layer, _) in layers.items()
        )

    before = distance()
    for parameter in (p for p in model.parameters() if p.requires_grad):
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert distance() > before
    assert handle.report()["distance"] > 0


def test_a_copy_that_peft_saves_is_trained_and_biased_as_an_ordinary_weight(setup):
    model = tiny.with_lora(setup, modules_to_save=["gate_proj"])
    handle = drift_merge.attach(model, setup.prior, rule="absolute", alpha=1.0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    handle.apply()
    copies = {n: p for n, p in model.named_parameters() if "modules_to_save" in n}
    assert len(copies) == 2
    for name, parameter in copies.items():
        path = name.removeprefix("base_model.model.").replace("modules_to_save.default.", "")
        assert torch.equal(parameter.grad, -setup.deltas[path])


def test_a_quantized_base_is_trained_through_lora_and_refused_without(setup):
    pytest.importorskip("bitsandbytes")
    config = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype="float32")
    model = transformers.AutoModelForImageTextToText.from_pretrained(
        setup.mllm, quantization_config=config, dtype=torch.float32, device_map="cpu"
    )
    with pytest.raises(drift_merge.AlignmentError, match=r"(?i)quanti"):
        drift_merge.attach(model, setup.prior)
    model = peft.prepare_model_for_kbit_training(model)
    config = peft.LoraConfig(r=4, target_modules=tiny.LORA_TARGETS)
    model = peft.get_peft_model(model, config)
    handle = drift_merge.attach(model, setup.prior)
    assert handle.coverage.units == 6
    model(**setup.collate(setup.samples(2))).loss.backward()
    before = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    handle.apply()
    moved = {n for n, p in model.named_parameters() if n in before and (p.grad != before[n]).any()}
    assert moved == {n for n in before if "lora_B" in n}  # A's direction is 0 while B is 0
