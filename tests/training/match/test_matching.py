"""Names of live models: wrappers, fusions, frozen, tied, quantized; nothing lost in silence."""

import gc
import json
from pathlib import Path

import pytest
import torch
from torch import nn

import drift_merge
from drift_merge.errors import AlignmentError, RecipeError
from drift_merge.training.match.matching import match
from tests import checkpoints as c
from tests.names.naive import META
from tests.runs import as_tensor, run_prior
from tests.training.naive import biased
from tests.training.toys import (
    Holder,
    Mllm,
    distinct,
    fuse,
    holder,
    loss_of,
    make_toy,
    memory_tensors,
)

NAMES = Path(__file__).parents[2] / "golden" / "names"
FAMILIES = {  # family: (prefix of the tower on disk, in memory)
    "tiny_qwen2_5_vl": ("model.", "model.language_model."),
    "tiny_qwen2_vl": ("model.", "model.language_model."),
    "tiny_llava": ("language_model.model.", "model.language_model."),
    "tiny_llava_next": ("language_model.model.", "model.language_model."),
    "tiny_idefics3": ("model.text_model.", "model.text_model."),
    "tiny_smolvlm": ("model.text_model.", "model.text_model."),
    "tiny_gemma3": ("language_model.model.", "model.language_model."),
    "tiny_qwen3_vl": ("model.language_model.", "model.language_model."),
    "tiny_internvl": ("language_model.model.", "model.language_model."),
}


def family(name):
    """Canonical shapes as a prior has them, and a module with the names in memory."""
    listed = json.loads((NAMES / f"{name}.json").read_text())
    disk, memory = FAMILIES[name]
    shapes = {n: tuple(s) for n, s in listed["shapes"].items()}
    prior = {n[len(disk) :]: s for n, s in shapes.items() if n.startswith(f"{disk}layers.")}
    by_tail = {n.removeprefix(disk): s for n, s in shapes.items()}
    live = {}
    for stored in listed["in_memory_names"]:
        tail = stored.removeprefix(memory)
        live[stored] = torch.zeros(by_tail.get(tail, (3,)) if tail != stored else (3,))
    return prior, holder(live)


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_names_in_memory_match_names_of_the_disk(name):
    prior, model = family(name)
    wanted = {n for n in prior if "self_attn" in n or ".mlp." in n if "norm" not in n}
    matching = match(model, prior)
    assert {unit.name for unit in matching.units} == wanted
    assert matching.coverage.matched == matching.coverage.selected == len(wanted)
    assert not matching.coverage.unmatched
    parameters = dict(model.named_parameters())
    for unit in matching.units:
        assert unit.parameter is parameters[unit.parameter_name]
        assert unit.parameter_name.endswith(unit.name)
        assert unit.shape == tuple(unit.parameter.shape)
        assert unit.begin == 0


WRAPPERS = {
    "module": lambda name: f"module.{name}",
    "compiled": lambda name: f"_orig_mod.{name}",
    "compiled ddp": lambda name: f"module._orig_mod.{name}",
    "fsdp": lambda name: f"_fsdp_wrapped_module.{name}".replace(
        "layers.0.", "layers.0._fsdp_wrapped_module."
    ),
    "checkpointed": lambda name: name.replace("layers.1.", "layers.1._checkpoint_wrapped_module."),
    "peft": lambda name: f"base_model.model.{name}",
    "saved": lambda name: f"base_model.model.{name}".replace(
        "mlp.up_proj.", "mlp.up_proj.modules_to_save.default."
    ),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_wrappers_change_nothing(toy, wrapper):
    tensors = memory_tensors(toy.pair.mllm)
    wrapped = holder({WRAPPERS[wrapper](name): values for name, values in tensors.items()})
    handle = drift_merge.attach(wrapped, toy.prior)
    assert handle.coverage.units == 20


def biased_under_ddp(toy):
    """A gradient before and after the bias; nothing holds the process group when it returns.

    Its end within Python's own cleaning up waited for a thread that waited for Python.
    """
    model = toy.model()
    for parameter in model.model.visual.parameters():
        parameter.requires_grad_(False)
    wrapped = nn.parallel.DistributedDataParallel(model)
    handle = drift_merge.attach(wrapped, toy.prior, rule="absolute", alpha=1.0)
    loss_of(wrapped).backward()
    weight = model.model.language_model.layers[0].mlp.up_proj.weight
    before = weight.grad.clone()
    handle.apply()
    after = weight.grad.clone()
    handle.remove()
    return before, after


def test_ddp_is_seen_through(toy):
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    try:
        before, after = biased_under_ddp(toy)
        gc.collect()
        assert torch.allclose(after, before - toy.deltas()["layers.0.mlp.up_proj.weight"])
    finally:
        torch.distributed.destroy_process_group()


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


def shapes_of(toy):
    return {name: tuple(entry["shape"]) for name, entry in toy.prior.tensors.items()}


def test_a_module_that_the_prior_lacks_is_an_error_that_says_how_to_compute_one(toy):
    with pytest.raises(
        AlignmentError, match=r"(?s)not in the prior, which holds attn \(14\), mlp"
    ) as e:
        match(toy.model(), shapes_of(toy), modules="attn,mlp,embed")
    assert "--modules attn,mlp,embed" in e.value.remedy


def test_a_layer_that_the_prior_lacks_is_an_error(toy):
    shapes = {n: s for n, s in shapes_of(toy).items() if not n.startswith("layers.1.")}
    with pytest.raises(AlignmentError, match=r"10 of 20 selected tensors have no partner"):
        match(toy.model(), shapes)
    assert match(toy.model(), shapes, layers="0").coverage.units == 10


def test_partial_coverage_warns_with_its_number_if_not_strict(toy):
    shapes = shapes_of(toy)
    del shapes["layers.1.mlp.up_proj.weight"]
    shapes["layers.7.mlp.up_proj.weight"] = (2, 2)
    shapes["layers.0.mlp.up_proj.weight"] = (2, 2)
    with pytest.warns(UserWarning, match="3 of 21 selected tensors have no partner"):
        coverage = match(toy.model(), shapes, is_strict=False).coverage
    assert coverage.units == coverage.matched == 18
    assert sorted(coverage.unmatched) == [
        "layers.0.mlp.up_proj.weight",
        "layers.1.mlp.up_proj.weight",
        "layers.7.mlp.up_proj.weight",
    ]
    assert "3 unmatched (" in coverage.text()


def test_no_match_at_all_is_an_error_even_if_not_strict(toy):
    shapes = dict.fromkeys(shapes_of(toy), (1, 1))
    with pytest.raises(AlignmentError, match="20 of 20 selected tensors"):
        match(toy.model(), shapes, is_strict=False)


def test_a_model_without_a_language_tower_is_refused(toy):
    with pytest.raises(AlignmentError, match="no language tower"):
        match(nn.Linear(2, 2), shapes_of(toy))


def test_frozen_parameters_are_counted_and_named(toy):
    model = toy.model()
    frozen = model.model.language_model.layers[0].self_attn
    frozen.requires_grad_(False)
    coverage = match(model, shapes_of(toy)).coverage
    assert (coverage.units, coverage.matched) == (13, 20)
    assert len(coverage.frozen) == 7
    assert "model.language_model.layers.0.self_attn.q_proj.bias" in coverage.frozen
    assert "7 frozen (model.language_model.layers.0.self_attn" in coverage.text()


def test_a_tower_that_is_all_frozen_is_refused(toy):
    model = toy.model()
    model.requires_grad_(False)
    with pytest.raises(AlignmentError, match=r"All 20 matched parameters are frozen"):
        match(model, shapes_of(toy))


def test_parameters_on_the_meta_device_are_refused(toy):
    with pytest.raises(AlignmentError, match="meta device"):
        match(toy.model().to("meta"), shapes_of(toy))


def test_a_resized_vocabulary_is_refused_with_the_remedy(tmp_path):
    toy = make_toy(tmp_path, modules="attn,embed")
    model = toy.model()
    model.model.language_model.embed_tokens = nn.Embedding(c.VOCABULARY + 2, c.HIDDEN)
    with pytest.raises(AlignmentError, match=r"embed_tokens\.weight") as error:
        match(model, shapes_of(toy), modules="attn,embed")
    assert "leave embed and head out" in error.value.remedy


def test_rows_without_a_partner_get_no_bias(tmp_path):
    words = [f"word{i}" for i in range(c.VOCABULARY)]
    files = [c.tokenizer(words), c.tokenizer([*words[:-1], "image"])]
    text, whole = distinct(c.text_shapes(), 1), distinct(c.text_shapes() | c.vision_shapes(), 2)
    c.write_checkpoint(tmp_path / "r", text, c.text_config(), sidecars={"tokenizer.json": files[0]})
    c.write_checkpoint(
        tmp_path / "m", whole, c.mllm_config(), sidecars={"tokenizer.json": files[1]}
    )
    prior = run_prior(
        tmp_path / "r", tmp_path / "m", tmp_path / "p", modules="embed", dtype="float32"
    ).prior
    model = Mllm()
    model.load_state_dict(memory_tensors(tmp_path / "m"))
    handle = drift_merge.attach(model, prior, modules="embed", rule="absolute", alpha=1.0)
    weight = model.model.language_model.embed_tokens.weight
    weight.grad = torch.zeros_like(weight)
    handle.apply()
    assert not weight.grad[-1].any()
    assert weight.grad[:-1].any(1).all()
    assert torch.equal(weight.grad, -as_tensor(c.read_tensors(prior.path)["embed_tokens.weight"]))


class Params4bit(nn.Parameter):
    """Called like that of bitsandbytes: packed, and of another shape."""

    def __new__(cls, data):
        return torch.Tensor._make_subclass(cls, data, False)


def quantise(model, kind):
    """Replace the weight of one projection by a packed one."""
    linear = model.model.language_model.layers[0].mlp.up_proj
    if kind == "bnb":
        packed = torch.zeros(linear.weight.numel() // 2, 1, dtype=torch.uint8)
        linear.register_parameter("weight", Params4bit(packed))
    else:
        del linear.weight
        linear.register_buffer("qweight", torch.zeros(4, 4, dtype=torch.int32))


@pytest.mark.parametrize("kind", ["bnb", "gptq"])
def test_quantized_weights_are_refused(toy, kind):
    model = toy.model()
    quantise(model, kind)
    with pytest.raises(AlignmentError, match=r"1 selected parameters are quantized.*up_proj") as e:
        match(model, shapes_of(toy))
    assert "LoRA" in e.value.remedy
    assert match(model, shapes_of(toy), modules="attn").coverage.units == 14


def test_fsdp1_is_refused(toy):
    class FullyShardedDataParallel(Holder):
        pass

    wrapped = FullyShardedDataParallel()
    wrapped.add_module("_fsdp_wrapped_module", toy.model())
    with pytest.raises(AlignmentError, match="FSDP1"):
        match(wrapped, shapes_of(toy))


def test_a_selection_of_nothing_is_refused(toy):
    with pytest.raises(AlignmentError, match="select no tensor"):
        match(toy.model(), shapes_of(toy), modules="re:no_such_name")
    with pytest.raises(RecipeError, match="modules is empty"):
        match(toy.model(), shapes_of(toy), modules=[])


def test_torchtitans_own_llama_is_refused_since_it_permutes_q_and_k(toy):
    """Equal shapes, other rows: what matched by luck would be biased along a wrong delta."""
    renamed = META | {f"self_attn.{x}_proj": f"attention.w{x}" for x in "qkv"}
    tensors = {}
    for name, tensor in memory_tensors(toy.pair.mllm).items():
        if not name.startswith("model.language_model."):
            continue
        name = name.removeprefix("model.language_model.")
        for ours, theirs in renamed.items():
            name = name.replace(ours, theirs)
        if ".wq." in name or ".wk." in name:  # halves of each head interleaved
            turned = tensor.unflatten(0, (-1, 2, c.HIDDEN // c.HEADS // 2)).transpose(1, 2)
            tensor = turned.reshape(tensor.shape).contiguous()
        tensors[name] = tensor
    with pytest.raises(AlignmentError) as caught:
        drift_merge.attach(holder(tensors), toy.prior)
    assert "q_proj" in str(caught.value)
