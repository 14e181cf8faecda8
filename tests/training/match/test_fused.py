"""Tensors that one side fuses and the other splits, and experts in one tensor."""

import pytest
import torch

import drift_merge
from drift_merge.errors import AlignmentError
from drift_merge.training.match.matching import match
from tests import checkpoints as c
from tests.runs import as_tensor, run_prior
from tests.training.naive import biased
from tests.training.toys import (
    distinct,
    fuse,
    holder,
    memory_tensors,
)


def interleave(tensors):
    """The same with InternLM2's wqkv: per key-value group its query heads, key, value."""
    fused = dict(tensors)
    groups = c.KV_HEADS
    for layer in range(2):
        at = f"model.language_model.layers.{layer}."
        for leaf in ("weight", "bias"):
            parts = [fused.pop(f"{at}self_attn.{x}_proj.{leaf}") for x in "qkv"]
            split = [p.reshape(groups, -1, *p.shape[1:]) for p in parts]
            joined = torch.cat(split, 1).reshape(-1, *parts[0].shape[1:])
            fused[f"{at}attention.wqkv.{leaf}"] = joined
        fused[f"{at}attention.wo.weight"] = fused.pop(f"{at}self_attn.o_proj.weight")
    return fused


@pytest.mark.parametrize("rule", ["adaptive_cosine", "gradnorm", "absolute_param_norm"])
def test_the_result_does_not_depend_on_fusing(toy, rule):
    tensors = memory_tensors(toy.pair.mllm)
    split, fused = holder(tensors), holder(fuse(tensors))
    generator = torch.Generator().manual_seed(0)
    noise = {n: torch.randn(t.shape, generator=generator) for n, t in tensors.items()}
    for model, gradients in ((split, noise), (fused, fuse(noise))):
        handle = drift_merge.attach(model, toy.prior, rule=rule, alpha=1.0)
        assert handle.coverage.matched == 20
        for name, parameter in model.named_parameters():
            parameter.grad = gradients[name].clone()
        handle.apply()
    found = fuse({n: p.grad for n, p in split.named_parameters()})
    for name, parameter in fused.named_parameters():
        assert torch.allclose(parameter.grad, found[name], rtol=1e-5, atol=1e-6), name


def test_heads_that_interleave_share_the_coefficient_of_their_tensor(toy):
    tensors = memory_tensors(toy.pair.mllm)
    model = holder(interleave(tensors))
    model.config = None
    shapes = {n: tuple(e["shape"]) for n, e in toy.prior.tensors.items()}
    with pytest.raises(AlignmentError):  # nothing says how many key-value heads there are
        match(model, shapes)
    model.config = {"num_key_value_heads": c.KV_HEADS}
    generator = torch.Generator().manual_seed(0)
    noise = {n: torch.randn(t.shape, generator=generator) for n, t in tensors.items()}
    gradients = interleave(noise)
    handle = drift_merge.attach(model, toy.prior, rule="gradnorm")
    for name, parameter in model.named_parameters():
        parameter.grad = gradients[name].clone()
    handle.apply()
    deltas = toy.deltas()
    at = "model.language_model.layers."
    split = {
        n: biased("gradnorm", g, deltas["layers." + n.removeprefix(at)])
        if n.removeprefix(at) != n and "layers." + n.removeprefix(at) in deltas and "norm" not in n
        else g.double()
        for n, g in noise.items()
    }
    wanted = interleave(split)
    for name, parameter in model.named_parameters():
        assert torch.allclose(parameter.grad.double(), wanted[name], rtol=1e-5, atol=1e-5), name


LAYER = "model.language_model.layers.0."


@pytest.fixture
def fused_prior(tmp_path):
    """A prior whose qkv is one tensor, and the tensors of a model that splits it."""
    shapes = {n: s for n, s in c.text_shapes(1).items() if not n.endswith("bias")}
    fused = {n: s for n, s in shapes.items() if not any(f"{x}_proj" in n for x in "qkv")}
    fused["model.layers.0.self_attn.qkv_proj.weight"] = (c.HIDDEN + 2 * c.KV, c.HIDDEN)
    config, vision = c.mllm_config(1), c.vision_shapes()
    c.write_checkpoint(tmp_path / "reasoner", distinct(fused, 1), c.text_config(1))
    c.write_checkpoint(tmp_path / "mllm", distinct(fused | vision, 2), config)
    made = run_prior(tmp_path / "reasoner", tmp_path / "mllm", tmp_path / "p", dtype="float32")
    tensors = memory_tensors(tmp_path / "mllm")
    parts = tensors.pop(f"{LAYER}self_attn.qkv_proj.weight").split([c.HIDDEN, c.KV, c.KV])
    for x, part in zip("qkv", parts, strict=True):
        tensors[f"{LAYER}self_attn.{x}_proj.weight"] = part.clone()
    return made.prior, tensors


def test_a_prior_that_fuses_what_the_model_splits_has_one_coefficient(fused_prior):
    """Sums run over q, k and v together, as the prior's tensor has them."""
    prior, tensors = fused_prior
    model = holder(tensors)
    handle = drift_merge.attach(model, prior, rule="gradnorm", modules="attn")
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    own = [dict(model.named_parameters())[f"{LAYER}self_attn.{x}_proj.weight"] for x in "qkv"]
    before = torch.cat([p.grad for p in own])
    handle.apply()
    delta = as_tensor(c.read_tensors(prior.path)["layers.0.self_attn.qkv_proj.weight"])
    wanted = biased("gradnorm", before, delta)
    assert torch.allclose(torch.cat([p.grad for p in own]).double(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rule", ["gradnorm", "absolute_param_norm"])
def test_of_a_tensor_that_is_partly_frozen_the_rest_is_biased(fused_prior, rule):
    """Norms of g and delta are those of the part; |theta|/|delta| is that of the whole."""
    prior, tensors = fused_prior
    model = holder(tensors)
    own = [dict(model.named_parameters())[f"{LAYER}self_attn.{x}_proj.weight"] for x in "qkv"]
    own[0].requires_grad_(False)
    handle = drift_merge.attach(model, prior, rule=rule, alpha=1.0, modules="attn")
    assert handle.coverage.frozen == (f"{LAYER}self_attn.q_proj.weight",)
    for parameter in own[1:]:
        parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3))
    before = torch.cat([p.grad for p in own[1:]])
    handle.apply()
    whole = as_tensor(c.read_tensors(prior.path)["layers.0.self_attn.qkv_proj.weight"])
    part = whole[c.HIDDEN :].double()
    norm = prior.tensors["layers.0.self_attn.qkv_proj.weight"]["norm_mllm"]
    share = float(part.norm() / whole.double().norm())
    wanted = biased(rule, before, part, mllm_norm=norm * share)
    found = torch.cat([p.grad for p in own[1:]]).double()
    assert torch.allclose(found, wanted, rtol=1e-5, atol=1e-5)


def experts(kind):
    """Two experts of a layer, stored one by one (prior) and fused (model)."""
    n, width, hidden = 2, 5, 6
    prior = {
        f"layers.0.mlp.experts.{e}.{p}_proj.weight": (hidden, width)
        if p == "down"
        else (width, hidden)
        for e in range(n)
        for p in ("gate", "up", "down")
    }
    gate_up, down = (n, 2 * width, hidden), (n, hidden, width)
    if kind == "transposed":
        gate_up, down = (n, hidden, 2 * width), (n, width, hidden)
    at = "model.language_model."
    model = {
        f"{at}layers.0.mlp.experts.gate_up_proj": torch.zeros(gate_up),
        f"{at}layers.0.mlp.experts.down_proj": torch.zeros(down),
        f"{at}embed_tokens.weight": torch.zeros(4, hidden),
    }
    return prior, holder(model)


def test_fused_experts_hold_one_unit_for_each_matrix_of_each_expert():
    prior, model = experts("linear")
    matching = match(model, prior)
    assert matching.coverage.matched == 6
    places = {(u.name.split("experts.")[1], u.begin, u.shape) for u in matching.units}
    assert ("1.up_proj.weight", 60 + 30, (5, 6)) in places
    assert ("0.gate_proj.weight", 0, (5, 6)) in places
    assert ("1.down_proj.weight", 30, (6, 5)) in places


def test_experts_fused_as_columns_are_refused_with_the_reason():
    prior, model = experts("transposed")
    with pytest.raises(AlignmentError, match="columns of a fused and transposed"):
        match(model, prior)


def test_transposed_experts_are_read_transposed(tmp_path):
    n, width, hidden = 2, 5, 6
    shapes = {
        "model.embed_tokens.weight": (4, hidden),
        "model.layers.0.mlp.experts.gate_up_proj": (n, hidden, 2 * width),
        "model.layers.0.mlp.experts.down_proj": (n, width, hidden),
        "visual.patch_embed.weight": (3, 3),
    }
    config = {"hidden_size": hidden, "num_hidden_layers": 1}
    c.write_checkpoint(tmp_path / "mllm", distinct(shapes, 1), config)
    text = {k: v for k, v in shapes.items() if "visual" not in k}
    c.write_checkpoint(tmp_path / "reasoner", distinct(text, 2), config)
    prior = run_prior(
        tmp_path / "reasoner", tmp_path / "mllm", tmp_path / "p", dtype="float32", modules="mlp"
    ).prior
    stored = memory_tensors(tmp_path / "mllm")
    model = holder(
        {k: v.transpose(1, 2).contiguous() if v.ndim == 3 else v for k, v in stored.items()}
    )
    handle = drift_merge.attach(model, prior, rule="absolute", alpha=1.0)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    handle.apply()
    deltas = {k: as_tensor(t) for k, t in c.read_tensors(prior.path).items()}
    for name, parameter in model.named_parameters():
        if "experts" in name:
            delta = deltas[name.removeprefix("model.language_model.")]
            assert torch.equal(parameter.grad, -delta.transpose(1, 2)), name
