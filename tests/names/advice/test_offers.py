"""Maps that refusals offer: pasted as they stand they make the alignment complete."""

import re

import pytest

from drift_merge.errors import AlignmentError
from drift_merge.names.align import align, require_complete
from drift_merge.names.name_map import NameMap, parse_name_map, write_name_map
from drift_merge.names.tensors import Model
from tests.names import families as f

H, W, KV = 8, 12, 4


def offered(reasoner, mllm, **options):
    """The map that stands in the remedy of a refusal; None if there is none."""
    with pytest.raises(AlignmentError) as caught:
        require_complete(align(reasoner, mllm, **options))
    remedy = caught.value.remedy
    if "--map:\n" not in remedy:
        assert "{layer}" not in remedy
        assert "tower:" not in remedy
        return None
    return remedy.split("--map:\n")[1].split("\nOtherwise")[0]


def works(text, reasoner, mllm, **options):
    """Paste a map: all that is selected must be matched."""
    found = align(reasoner, mllm, name_map=parse_name_map(text), **options)
    require_complete(found)
    return {pair.canonical: pair.parts[0].name for pair in found.pairs}


def renamed(tails, **names):
    """The layer with other words for its modules."""
    found = {}
    for tail, shape in tails.items():
        for old, new in names.items():
            tail = tail.replace(old.replace("__", "."), new)
        found[tail] = shape
    return found


LAYER = f.layer(bias=False)


def test_other_words_of_a_class_that_names_do_not_tell_are_offered_in_one_map():
    tails = renamed(LAYER, self_attn__k="att.k", self_attn__v="att.v")
    for ours, theirs in (
        (Model("odd", f.decoder(tails=tails)), f.mllm(tails=LAYER)),
        (Model("text", f.decoder(tails=LAYER)), f.mllm(tails=tails)),
    ):
        text = offered(ours, theirs)
        pairs = works(text, ours, theirs)
        for number in range(3):
            for letter in "qkvo":
                target = f"layers.{number}.self_attn.{letter}_proj.weight"
                assert f".{number}." in pairs[target]
                assert f".{letter}_proj." in pairs[target]


def test_both_sides_are_said_at_once():
    ours, theirs = f.decoder("a.", None), f.mllm("b.", None).shapes
    for shapes in (ours, theirs):
        for name in [n for n in shapes if "embed_tokens" in n]:
            del shapes[name]
    text = offered(Model("a", ours), Model("b", theirs))
    assert text == "reasoner:\n  tower: a.layers\nmllm:\n  tower: b.layers"
    assert len(works(text, Model("a", ours), Model("b", theirs))) == 3 * 10


def test_a_list_within_one_layer_is_no_tower():
    """T5 numbers the parts of a block: `block.0.layer.1` is no layer of a tower."""
    tails = {f"layer.{i}.{tail}": shape for i, (tail, shape) in enumerate(LAYER.items())}
    text = {f"block.{n}.{tail}": shape for n in range(3) for tail, shape in tails.items()}
    ours = Model("t5", {"shared.weight": (20, H), **text})
    theirs = Model("mllm", {f"decoder.{n}": s for n, s in ours.shapes.items()} | f.VISION)
    assert offered(ours, theirs) is None


def test_a_tower_and_its_names_come_in_one_map():
    tails = renamed(LAYER, self_attn="att")
    shapes = f.decoder("a.", None, tails=tails)
    del shapes["a.embed_tokens.weight"]
    ours, theirs = Model("a", shapes), f.mllm(tails=LAYER)
    text = offered(ours, theirs)
    assert "tower: a.layers" in text
    assert len(works(text, ours, theirs)) == 3 * 7


@pytest.mark.parametrize(
    "names",
    [
        {"self_attn__q_proj": "attention.wq", "self_attn__k_proj": "attention.wk"},
        {"self_attn__q_proj": "attention.wq"},
        {"self_attn__k_proj": "att.foo"},  # k alone has its shape, but in which order?
        {"self_attn__q_proj": "att.one", "self_attn__o_proj": "att.two"},
        {"mlp__gate_proj": "ff.one", "mlp__up_proj": "ff.two"},
    ],
)
def test_what_shape_cannot_tell_is_not_offered(names):
    ours, theirs = Model("text", f.decoder(tails=LAYER)), f.mllm(tails=renamed(LAYER, **names))
    assert offered(ours, theirs) is None
    assert (
        offered(Model("t", f.decoder(tails=renamed(LAYER, **names))), f.mllm(tails=LAYER)) is None
    )


@pytest.mark.parametrize("fused", ["w13_weight", "ff_proj.weight", "gate_up.weight", "c_fc.weight"])
def test_a_fused_matrix_is_not_offered_for_another(fused):
    tails = {t: s for t, s in LAYER.items() if "gate" not in t and "up" not in t}
    ours = Model("text", f.decoder(tails=tails | {"ff.fused_in.weight": (2 * W, H)}))
    theirs = f.mllm(tails=tails | {f"mlp.{fused}": (2 * W, H)})
    text = offered(ours, theirs)
    assert (text is not None) == (fused == "c_fc.weight")


@pytest.mark.parametrize("leaf", ["weight_scale_inv", "qzeros", "weight_packed"])
def test_a_quantized_module_is_not_offered(leaf):
    tails = renamed(LAYER, self_attn__v="att.v")
    ours = Model("text", f.decoder(tails=LAYER))
    assert offered(ours, f.mllm(tails=tails)) is not None
    assert offered(ours, f.mllm(tails=tails | {f"att.v_proj.{leaf}": (KV,)})) is None


def test_other_sizes_get_no_map():
    other = {t: tuple(n + 1 for n in s) for t, s in renamed(LAYER, self_attn="att").items()}
    assert offered(Model("text", f.decoder(tails=LAYER)), f.mllm(tails=other)) is None


def test_what_the_users_own_map_says_is_kept():
    tails = renamed(LAYER, self_attn__v="att.v", self_attn__k="att.k")
    ours, theirs = Model("text", f.decoder(tails=LAYER)), f.mllm(tails=tails)
    own = (
        'mllm:\n  "language_model.model.layers.{layer}.att.v_proj.weight":'
        ' "layers.{layer}.self_attn.v_proj.weight"'
    )
    text = offered(ours, theirs, name_map=parse_name_map(own))
    assert "v_proj" in text
    assert "k_proj" in text
    works(text, ours, theirs)


@pytest.mark.parametrize(
    "text",
    [
        'reasoner:\n  tower: a.b\n  "x.{layer}.*.w": "layers.{layer}.*.weight"\n  "y.*": null',
        'mllm:\n  tower: ""',
        "",
    ],
)
def test_a_written_map_reads_back_as_it_was(text):
    read = parse_name_map(text)
    assert parse_name_map(write_name_map(read)) == read
    assert (read == NameMap()) == (text == "")
    assert re.sub(r"\s", "", write_name_map(read)) == re.sub(r"\s", "", text)
