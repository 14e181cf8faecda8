"""LoRA on layers written here after PEFT's form: the projection, by autograd in float64."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from drift_merge.errors import RecipeError
from drift_merge.training.lora import projection
from drift_merge.training.lora.directions import directions
from drift_merge.training.lora.layers import find_adapted, require_supported
from tests.training.lora.layers import IN, OUT, RANK, ArrowLinearVariant, ToyLora


def adapted_of(layer):
    (adapted,) = find_adapted(nn.ModuleDict({"q_proj": layer})).values()
    return adapted


def random_delta(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).double()


def project(adapted, delta, first_row=0):
    matrix = delta.reshape(-1, delta.shape[-1])
    rows = matrix.shape[0]
    return directions(adapted, lambda first, last: matrix[first:last], first_row, rows)


def expected(layer, adapted, delta):
    """The gradients of <delta, W> by the factors: what biasing G by delta means for them."""
    parameters = [factor.parameter for factor in adapted.factors]
    return torch.autograd.grad((layer.weight() * delta).sum(), parameters)


def assert_equal(ours, theirs):
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        assert one.shape == other.shape
        limit = 64 * torch.finfo(torch.float64).eps * max(1.0, other.abs().max().item())
        assert (one - other).abs().max() <= limit


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_directions_are_the_vector_jacobian_product_of_the_weight(dora):
    layer, delta = ToyLora(dora=dora), random_delta(OUT, IN)
    adapted = adapted_of(layer)
    assert [factor.role for factor in adapted.factors] == ["a", "b"] + ["m"] * dora
    assert_equal(project(adapted, delta), expected(layer, adapted, delta))


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_subtracting_the_directions_equals_biasing_the_dense_gradient_and_projecting(dora):
    layer, delta, c = ToyLora(dora=dora), random_delta(OUT, IN), 0.37
    adapted = adapted_of(layer)
    parameters = [factor.parameter for factor in adapted.factors]
    x, target = random_delta(7, IN, seed=2), random_delta(7, OUT, seed=3)

    def loss(weight):
        return ((x @ weight.T - target) ** 2).mean()

    dense = layer.weight().detach().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(dense), dense)
    biased = torch.autograd.grad((layer.weight() * (gradient - c * delta)).sum(), parameters)
    plain = torch.autograd.grad(loss(layer.weight()), parameters)
    ours = [g - c * d for g, d in zip(plain, project(adapted, delta), strict=True)]
    assert_equal(ours, biased)


def test_rslora_is_followed_through_the_layers_own_scaling():
    layer, delta = ToyLora(rank=4), random_delta(OUT, IN)
    layer.scaling["default"] = 8.0 / math.sqrt(4)
    adapted = adapted_of(layer)
    before = project(adapted, delta)
    assert_equal(before, expected(layer, adapted, delta))
    layer.scaling["default"] *= 0.5  # PEFT's scale_layer, during training
    assert_equal([0.5 * d for d in before], project(adapted, delta))


def test_with_b_zero_as_peft_begins_the_direction_of_a_is_zero_and_that_of_b_is_not():
    layer = ToyLora()
    nn.init.zeros_(layer.lora_B["default"].weight)
    a, b = project(adapted_of(layer), random_delta(OUT, IN))
    assert not a.any()
    assert b.norm() > 0


def test_a_row_of_zeros_under_dora_gives_no_direction_and_no_nan():
    layer = ToyLora(dora=True)
    with torch.no_grad():
        layer.base_layer.weight[2] = 0
        layer.lora_B["default"].weight[2] = 0
    a, b, m = project(adapted_of(layer), random_delta(OUT, IN))
    assert all(direction.isfinite().all() for direction in (a, b, m))
    assert m[2] == 0
    assert not b[2].any()


@given(elements=st.integers(1, 40), dora=st.booleans())
def test_the_size_of_the_chunks_changes_nothing_but_rounding(elements, dora):
    layer, delta = ToyLora(dora=dora), random_delta(OUT, IN)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(projection._CHUNK_ELEMENTS, "cpu", elements)
        cut = project(adapted_of(layer), delta)
    assert_equal(cut, project(adapted_of(layer), delta))


def test_no_more_than_a_chunk_of_delta_is_read_at_a_time(monkeypatch):
    monkeypatch.setitem(projection._CHUNK_ELEMENTS, "cpu", 2 * IN)
    delta, asked = random_delta(OUT, IN), []

    def read(first, last):
        asked.append((first, last))
        return delta[first:last]

    directions(adapted_of(ToyLora()), read, 0, OUT)
    assert asked == [(0, 2), (2, 4), (4, 6)]


def test_the_parts_of_a_fused_weight_add_up_to_the_whole():
    layer, delta = ToyLora(dora=True), random_delta(OUT, IN)
    adapted = adapted_of(layer)
    upper, lower = project(adapted, delta[:4]), project(adapted, delta[4:], first_row=4)
    assert_equal([u + w for u, w in zip(upper, lower, strict=True)], project(adapted, delta))
    assert not upper[1][4:].any()
    assert not lower[1][:4].any()


def test_every_active_adapter_has_its_own_directions_and_an_inactive_one_none():
    layer, delta = ToyLora(), random_delta(OUT, IN)
    layer.add("second", 2, 3.0)
    layer.add("resting", 2, 1.0)
    layer.active_adapters.remove("resting")
    adapted = adapted_of(layer)
    names = [factor.name for factor in adapted.factors]
    assert [name.split(".")[2] for name in names] == ["default", "default", "second", "second"]
    assert_equal(project(adapted, delta), expected(layer, adapted, delta))


def test_a_frozen_factor_has_no_direction():
    layer, delta = ToyLora(), random_delta(OUT, IN)
    layer.lora_A["default"].requires_grad_(False)  # LoRA-FA
    adapted = adapted_of(layer)
    assert [factor.role for factor in adapted.factors] == ["b"]
    assert_equal(project(adapted, delta), expected(layer, adapted, delta))


def test_a_layer_without_a_trained_factor_is_not_adapted():
    frozen, disabled = ToyLora().requires_grad_(False), ToyLora()
    disabled.disable_adapters = True
    assert find_adapted(nn.ModuleList([frozen, disabled, nn.Linear(2, 2)])) == {}


def test_the_weight_is_named_as_the_model_names_it():
    model = nn.Module()
    model.layers = nn.ModuleList([ToyLora()])
    (name,) = find_adapted(model)
    assert name == "layers.0.base_layer.weight"
    assert name in dict(model.named_parameters())


def test_a_packed_base_weight_is_never_read_and_its_shape_is_that_of_the_layer():
    layer, delta = ToyLora(), random_delta(OUT, IN)
    plain = project(adapted_of(layer), delta)
    layer.base_layer = nn.Module()  # GPTQ: no parameter called weight at all
    layer.base_layer.register_buffer("qweight", torch.zeros(1, dtype=torch.int32))
    adapted = adapted_of(layer)
    assert adapted.name == "q_proj.base_layer.weight"
    assert adapted.shape == (OUT, IN)
    assert_equal(project(adapted, delta), plain)


def test_a_transposed_weight_takes_a_transposed_delta():
    layer, delta = ToyLora(), random_delta(OUT, IN)
    plain = project(adapted_of(layer), delta)
    layer.fan_in_fan_out = True  # GPT-2's Conv1D
    adapted = adapted_of(layer)
    assert adapted.shape == (IN, OUT)
    assert_equal(project(adapted, delta.T.contiguous()), plain)


@pytest.mark.parametrize("is_swapped", [True, False])
def test_experts_follow_pefts_order_of_the_ranks(is_swapped):
    experts = 4
    layer = ToyLora(experts=experts)
    layer._did_swap_in_out_features = is_swapped
    adapted = adapted_of(layer)
    matrix = (OUT, IN) if is_swapped else (IN, OUT)
    assert adapted.shape == (experts, *matrix)
    delta = random_delta(*adapted.shape)
    a = layer.lora_A["default"].weight.reshape(experts, -1, IN)
    b = layer.lora_B["default"].weight.reshape(OUT, -1, experts)
    form = "ore,eri->eoi" if is_swapped else "ore,eri->eio"
    weight = layer.scaling["default"] * torch.einsum(form, b, a)
    parameters = [factor.parameter for factor in adapted.factors]
    assert_equal(project(adapted, delta), torch.autograd.grad((weight * delta).sum(), parameters))
    # One expert of the checkpoint is a run of rows of the weight in memory.
    alone = [project(adapted, delta[e], first_row=e * matrix[0]) for e in range(experts)]
    assert_equal([sum(parts) for parts in zip(*alone, strict=True)], project(adapted, delta))


def test_half_precision_factors_are_multiplied_in_float32():
    layer, delta = ToyLora(), random_delta(OUT, IN)
    exact = project(adapted_of(layer), delta)
    layer.lora_A.to(torch.bfloat16), layer.lora_B.to(torch.bfloat16)
    for ours, theirs in zip(project(adapted_of(layer), delta), exact, strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours.double(), theirs, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("spoil", ["variant", "two", "transposed"])
def test_what_does_not_act_as_a_projection_is_refused_by_name(spoil):
    layer = ToyLora(dora=True)
    if spoil == "variant":
        layer.lora_variant["default"] = ArrowLinearVariant()
    elif spoil == "two":
        layer.add("second", 2, 1.0)
    else:
        layer.fan_in_fan_out = True
    word = {"variant": "ArrowLinearVariant", "two": "several", "transposed": "transposed"}[spoil]
    with pytest.raises(RecipeError, match=rf"q_proj\.base_layer\.weight.*{word}"):
        require_supported(adapted_of(layer))


def test_lora_dora_and_several_lora_adapters_are_supported():
    layer = ToyLora()
    layer.add("second", 2, 1.0)
    for one in (layer, ToyLora(dora=True)):
        require_supported(adapted_of(one))


def test_an_embedding_has_its_factors_in_pefts_other_tables():
    layer = ToyLora()
    a = nn.Parameter(random_delta(RANK, 9, seed=5))
    b = nn.Parameter(random_delta(4, RANK, seed=6))
    layer.lora_A, layer.lora_B = nn.ModuleDict(), nn.ModuleDict()
    layer.lora_embedding_A = nn.ParameterDict({"default": a})
    layer.lora_embedding_B = nn.ParameterDict({"default": b})
    layer.in_features, layer.out_features = 9, 4
    adapted = adapted_of(layer)
    assert adapted.shape == (9, 4)
    delta = random_delta(9, 4)
    weight = layer.scaling["default"] * (b @ a).T
    assert_equal(project(adapted, delta), torch.autograd.grad((weight * delta).sum(), [a, b]))


def test_sharded_factors_are_gathered_before_the_projection():
    class Gathered(torch.Tensor):
        """Like a DTensor: `detach()` keeps the kind, `full_tensor` gives the whole."""

        def detach(self):
            return self

        def full_tensor(self):
            return torch.Tensor(self).double()

    from drift_merge.training.lora.directions import _whole

    assert type(_whole(torch.ones(2).as_subclass(Gathered))) is torch.Tensor
