"""Names and layouts that differ between the disk and memory: every gradient is biased by its own.

Plain modules that carry the conversion of a transformers model; expected values are made from
the two checkpoints by hand.
"""

import pytest
import torch
from torch import Tensor, nn

import drift_merge
from drift_merge.errors import AlignmentError
from drift_merge.names.modules import classify
from tests import checkpoints as c
from tests.runs import as_tensor, run_prior
from tests.training.match.renaming import (
    Converter,
    Guarded,
    Renaming,
    experts,
    join,
    operation,
    stack,
)
from tests.training.toys import distinct, holder

HIDDEN, WIDTH, EXPERTS, LAYERS = 8, 6, 11, 2
DISK, MEMORY = "model.layers", "model.language_model.layers"


@pytest.fixture
def made(tmp_path):
    """Make the prior of a pair whose layers have these tensors, and return both models too."""

    def make(layer: dict[str, tuple[int, ...]], modules=None):
        kinds = {classify(f"layers.0.{name}") for name in layer}
        modules = modules or ",".join(sorted(kinds & {"attn", "mlp", "norm"}))
        shapes = {f"{DISK}.{n}.{k}": s for n in range(LAYERS) for k, s in layer.items()}
        shapes["model.embed_tokens.weight"] = (12, HIDDEN)
        config = {"hidden_size": HIDDEN, "num_hidden_layers": LAYERS}
        vision = {"visual.patch_embed.weight": (3, 3)}
        c.write_checkpoint(tmp_path / "reasoner", distinct(shapes, 1), config)
        c.write_checkpoint(tmp_path / "mllm", distinct(shapes | vision, 2), config)
        pair = tmp_path / "reasoner", tmp_path / "mllm"
        prior = run_prior(*pair, tmp_path / "prior", dtype="float32", modules=modules).prior
        read = ({n: as_tensor(t) for n, t in c.read_tensors(one).items()} for one in pair)
        return prior, *read

    return make


def live(tensors: dict[str, Tensor], *conversions) -> nn.Module:
    model = holder({name: tensor.clone().contiguous() for name, tensor in tensors.items()})
    if conversions:
        model._weight_conversions = list(conversions)
    return model


def biases(model: nn.Module, prior, **options) -> dict[str, Tensor]:
    """What attach puts into gradients of zero under the rule absolute: -delta."""
    handle = drift_merge.attach(model, prior, rule="absolute", alpha=1.0, **options)
    assert handle.coverage.by_value == ()  # the conversion is enough
    assert handle.coverage.matched == handle.coverage.selected == len(prior.tensors)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    handle.apply()
    handle.remove()
    return {n: p.grad for n, p in model.named_parameters()}


def require_deltas(model, prior, lay, reasoner, mllm, **options):
    """The bias of every parameter is theta_reasoner - theta_mllm, both laid out as in memory."""
    found = biases(model, prior, **options)
    one, other = lay(reasoner), lay(mllm)
    for name, bias in found.items():
        wanted = one[name] - other[name] if ".layers." in name else torch.zeros_like(bias)
        assert torch.allclose(-bias, wanted, atol=1e-7), name
        assert ".layers." not in name or bias.abs().sum() > 0


def moved(tensors, *replacements):
    """The tensors with other names; vision and embedding have theirs in memory."""
    found = {}
    for name, tensor in tensors.items():
        for old, new in (*replacements, ("visual.", "model.visual.")):
            name = name.replace(old, new)
        found[
            name.replace("model.layers", MEMORY).replace(
                "model.embed", "model.language_model.embed"
            )
        ] = tensor
    return found


PREFIX = Renaming(r"^model\.(?!language_model|visual)", "model.language_model.")
INSIDE = (
    (".self_attn.to_q.", ".self_attn.q_proj."),
    (".self_attn.to_out.", ".self_attn.o_proj."),
    (".mlp.up_proj.", ".mlp.fc1."),
    (".mlp.down_proj.", ".mlp.fc2."),
)
DENSE = {
    "self_attn.to_q.weight": (HIDDEN, HIDDEN),
    "self_attn.to_out.weight": (HIDDEN, HIDDEN),
    "mlp.up_proj.weight": (WIDTH, HIDDEN),
    "mlp.down_proj.weight": (HIDDEN, WIDTH),
}


def renamings():
    return [PREFIX, *(Renaming(old.replace(".", r"\."), new) for old, new in INSIDE)]


WRAPPERS = {
    "bare": lambda model: model,
    "compiled": lambda model: holder_of("_orig_mod", model),
    "ddp of lightning": lambda model: holder_of("module", holder_of("model", model)),
    "peft": lambda model: holder_of("base_model", holder_of("model", model)),
}


def holder_of(name: str, model: nn.Module) -> nn.Module:
    outer = nn.Module()
    outer.add_module(name, model)
    return outer


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_names_inside_a_layer_are_looked_up_through_the_models_own_conversion(made, wrapper):
    prior, reasoner, mllm = made(DENSE)
    model = WRAPPERS[wrapper](live(moved(mllm, *INSIDE), *renamings()))
    (path,) = (name for name, m in model.named_modules() if "_weight_conversions" in vars(m))
    prefix = f"{path}." if path else ""

    def lay(tensors):
        return {prefix + name: tensor for name, tensor in moved(tensors, *INSIDE).items()}

    require_deltas(model, prior, lay, reasoner, mllm)


def test_names_that_change_places_are_not_paired_by_their_equal_names(made):
    """The norm1 of the disk is the norm2 of memory: equal names, equal shapes, other tensors."""
    prior, reasoner, mllm = made(DENSE | {"norm0.weight": (HIDDEN,), "norm1.weight": (HIDDEN,)})
    places = (*INSIDE, ("norm1", "norm2"), ("norm0", "norm1"))
    model = live(moved(mllm, *places), *renamings(), Guarded())
    require_deltas(
        model, prior, lambda t: moved(t, *places), reasoner, mllm, modules="attn,mlp,norm"
    )


def test_experts_of_any_names_are_found_in_the_fused_tensor(made):
    names = [f"moe.bank.{e}" for e in range(EXPERTS)]
    prior, reasoner, mllm = made(
        {f"{n}.w{i}.weight": (WIDTH, HIDDEN) for n in names for i in (1, 3)}
        | {f"{n}.w2.weight": (HIDDEN, WIDTH) for n in names}
    )

    def lay(tensors):
        found = {}
        for layer in range(LAYERS):
            at = f"{DISK}.{layer}.moe.bank.*"
            one, two, three = (experts(tensors, f"{at}.w{i}.weight", EXPERTS) for i in (1, 2, 3))
            found[f"{MEMORY}.{layer}.mlp.experts.gate_up"] = torch.cat([one, three], 1)
            found[f"{MEMORY}.{layer}.mlp.experts.down"] = two
        rest = {n: t for n, t in tensors.items() if ".moe." not in n}
        return found | moved(rest)

    model = live(
        lay(mllm),
        PREFIX,
        Converter(
            ["moe.bank.*.w1.weight", "moe.bank.*.w3.weight"],
            ["mlp.experts.gate_up"],
            stack(),
            join(1),
        ),
        Converter(["moe.bank.*.w2.weight"], ["mlp.experts.down"], stack()),
    )
    require_deltas(model, prior, lay, reasoner, mllm)


@pytest.mark.parametrize("is_equal", [False, True])
def test_what_the_disk_fuses_is_found_in_the_tensors_it_is_cut_into(made, is_equal):
    """att_proj in pieces of their own sizes; ff_proj up first, in halves."""
    kv = HIDDEN if is_equal else HIDDEN // 2
    prior, reasoner, mllm = made(
        {
            "self_attn.att_proj.weight": (HIDDEN + 2 * kv, HIDDEN),
            "mlp.ff_proj.weight": (2 * WIDTH, HIDDEN),
        }
    )

    def lay(tensors):
        found = moved({n: t for n, t in tensors.items() if "_proj" not in n})
        for layer in range(LAYERS):
            at, to = f"{DISK}.{layer}", f"{MEMORY}.{layer}"
            parts = tensors[f"{at}.self_attn.att_proj.weight"].split([HIDDEN, kv, kv])
            found |= {
                f"{to}.self_attn.{x}_proj.weight": p for x, p in zip("qkv", parts, strict=True)
            }
            up, gate = tensors[f"{at}.mlp.ff_proj.weight"].chunk(2)
            found |= {f"{to}.mlp.up_proj.weight": up, f"{to}.mlp.gate_proj.weight": gate}
        return found

    model = live(
        lay(mllm),
        PREFIX,
        Converter(
            ["self_attn.att_proj"],
            [f"self_attn.{x}_proj" for x in "qkv"],
            operation("Split", dim=0),
        ),
        Converter(
            ["mlp.ff_proj.weight"],
            ["mlp.up_proj.weight", "mlp.gate_proj.weight"],
            operation("Chunk", dim=0, num_shards_attribute=None),
        ),
    )
    require_deltas(model, prior, lay, reasoner, mllm)


def test_rows_that_the_disk_interleaves_are_read_one_after_the_other(made):
    """Gate and up take turns, row by row; of experts fused, of a dense block cut in two."""
    prior, reasoner, mllm = made(
        {"mlp.experts.w13": (3, 2 * WIDTH, HIDDEN), "mlp.w13_dn.weight": (2 * WIDTH, HIDDEN)}
    )

    def lay(tensors):
        found = moved({n: t for n, t in tensors.items() if "w13" not in n})
        for layer in range(LAYERS):
            at, to = f"{DISK}.{layer}.mlp", f"{MEMORY}.{layer}.mlp"
            both = tensors[f"{at}.experts.w13"]
            found[f"{to}.experts.gate_up_proj"] = torch.cat([both[:, ::2], both[:, 1::2]], 1)
            both = tensors[f"{at}.w13_dn.weight"]
            found |= {f"{to}.gate_proj.weight": both[::2], f"{to}.up_proj.weight": both[1::2]}
        return found

    deal = [operation("Interleave", dim=dim, inverse=False) for dim in (0, 1)]
    halves = operation("Chunk", dim=0, num_shards_attribute=None)
    model = live(
        lay(mllm),
        PREFIX,
        Converter(["mlp.experts.w13"], ["mlp.experts.gate_up_proj"], deal[1]),
        Converter(["mlp.w13_dn"], ["mlp.gate_proj", "mlp.up_proj"], deal[0], halves),
    )
    require_deltas(model, prior, lay, reasoner, mllm)
    refreshed = drift_merge.attach(model, prior, rule="absolute", alpha=1.0)
    refreshed.refresh()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    refreshed.apply()
    for name, tensor in lay(reasoner).items():
        if ".layers." in name:
            parameter = model.get_parameter(name)
            assert torch.allclose(parameter - parameter.grad, tensor, atol=1e-7), name


@pytest.mark.parametrize("is_checked", [False, True])
def test_experts_that_are_turned_on_loading_are_read_turned(made, is_checked):
    prior, reasoner, mllm = made({"mlp.experts.down_proj": (3, WIDTH, HIDDEN)})

    def lay(tensors):
        return {n: t.transpose(1, 2) if t.ndim == 3 else t for n, t in moved(tensors).items()}

    turn = operation("Transpose", dim0=1, dim1=2, check_dims=is_checked)
    model = live(
        lay(mllm), PREFIX, Converter(["mlp.experts.down_proj"], ["mlp.experts.down_proj"], turn)
    )
    require_deltas(model, prior, lay, reasoner, mllm)


def test_experts_of_text_are_the_first_of_a_list_that_holds_those_of_vision_too(made):
    prior, reasoner, mllm = made(
        {f"mlp.experts.{e}.up_proj.weight": (WIDTH, HIDDEN) for e in range(4)}
    )

    def lay(tensors):
        found = moved({n: t for n, t in tensors.items() if ".experts." not in n})
        for layer in range(LAYERS):
            both = experts(tensors, f"{DISK}.{layer}.mlp.experts.*.up_proj.weight", 4)
            found[f"{MEMORY}.{layer}.mlp.text.experts.up_proj"] = both[:2]
            found[f"{MEMORY}.{layer}.mlp.vision.experts.up_proj"] = both[2:]
        return found

    split = operation("ErnieFuseAndSplitTextVisionExperts", stack_dim=0, concat_dim=1)
    targets = ["mlp.text.experts.up_proj", "mlp.vision.experts.up_proj"]
    model = live(lay(mllm), PREFIX, Converter(["mlp.experts.*.up_proj.weight"], targets, split))
    require_deltas(model, prior, lay, reasoner, mllm)


def test_an_operation_that_is_not_known_is_refused_by_the_names_of_both_sides(made):
    """What it does to the values is not known: no pairing by guess."""
    prior, _, mllm = made(
        {"self_attn.wq.weight": (HIDDEN, HIDDEN), "mlp.up_proj.weight": (WIDTH, HIDDEN)}
    )
    places = (("self_attn.wq", "self_attn.q_proj"),)
    turned = {n: t.flip(0) if "q_proj" in n else t for n, t in moved(mllm, *places).items()}
    rope = Converter(["self_attn.wq"], ["self_attn.q_proj"], operation("PermuteForRope"))
    with pytest.raises(AlignmentError) as caught:
        drift_merge.attach(live(turned, PREFIX, rope), prior)
    assert "on the disk model.layers.0.self_attn.wq.weight" in caught.value.message
    assert f"nearest in memory {MEMORY}.0.self_attn.q_proj.weight" in caught.value.message


def test_the_conversion_of_the_model_stays_as_it_was(made):
    """transformers writes a checkpoint by what was used; attach must not use anything."""
    prior, _, mllm = made(DENSE)
    conversions = [Renaming(r.pattern, r.replacement) for r in renamings()]
    drift_merge.attach(live(moved(mllm, *INSIDE), *conversions), prior)
    assert not any(one.was_used for one in conversions)


def test_the_mapping_of_a_class_is_read_where_a_model_has_no_conversion(made):
    """transformers 4.57 and remote code: `_checkpoint_conversion_mapping`."""
    prior, reasoner, mllm = made(DENSE)
    model = live(moved(mllm, *INSIDE))
    kind = type("PreTrainedModel", (type(model),), {})
    model.__class__ = kind
    kind._checkpoint_conversion_mapping = {
        r"layers\.(\d+)\.mlp\.up_proj": r"language_model.layers.\1.mlp.fc1",
        r"layers\.(\d+)\.mlp\.down_proj": r"language_model.layers.\1.mlp.fc2",
        r"layers\.(\d+)\.self_attn\.to_q": r"language_model.layers.\1.self_attn.q_proj",
        r"layers\.(\d+)\.self_attn\.to_out": r"language_model.layers.\1.self_attn.o_proj",
    }
    require_deltas(model, prior, lambda t: moved(t, *INSIDE), reasoner, mllm)
