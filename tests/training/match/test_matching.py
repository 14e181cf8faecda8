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
from tests.training.toys import (
    Holder,
    Mllm,
    distinct,
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
