"""Words of --modules keep their promise, and what no word takes is named."""

import pytest

from drift_merge.errors import AlignmentError
from drift_merge.names.align import align, require_complete
from drift_merge.names.tensors import Model
from tests.names import families as f
from tests.names.layers.blocks import ATTENTION_BLOCK, MAMBA_BLOCK, MLP_BLOCK, OPT

HYBRID = (MAMBA_BLOCK, MLP_BLOCK, ATTENTION_BLOCK)


def tower(prefix, blocks):
    shapes = {f"{prefix}embeddings.weight": (20, 32), f"{prefix}norm_f.weight": (32,)}
    for number, block in enumerate(blocks):
        shapes |= {f"{prefix}layers.{number}.{tail}": shape for tail, shape in block.items()}
    return shapes


def pair(blocks):
    mllm = {**tower("language_model.backbone.", blocks), **f.VISION}
    return Model("text", tower("backbone.", blocks)), Model("mllm", mllm)


def selected(alignment):
    return sorted(pair.mllm.split(".", 4)[-1] for pair in alignment.pairs)


@pytest.mark.parametrize(
    ("word", "names"),
    [
        ("mlp", ["mixer.down_proj.weight", "mixer.up_proj.weight"]),
        ("attn", [f"mixer.{p}_proj.weight" for p in "kqov"]),
        ("mixer", [n for n in MAMBA_BLOCK if n not in ("norm.weight", "mixer.norm.weight")]),
    ],
)
def test_a_hybrid_tower_gives_each_word_its_blocks(word, names):
    found = align(*pair(HYBRID), modules=word)
    require_complete(found)
    assert selected(found) == sorted(names)


def test_what_no_word_takes_is_named_with_its_number():
    found = align(*pair(HYBRID), modules="attn,mlp,norm")
    said = next(x for x in found.findings if x.code == "left_out")
    assert (said.severity, "6 of the language" in said.message) == ("warning", True)
    assert "mixer (6)" in said.message
    assert "mixer" in said.remedy
    every = align(*pair(HYBRID), modules="attn,mlp,norm,mixer")
    assert not any(x.code == "left_out" for x in every.findings)


def test_opt_has_an_mlp():
    found = align(*pair([OPT, OPT]), modules="mlp")
    require_complete(found)
    assert selected(found) == sorted(["fc1.bias", "fc1.weight", "fc2.bias", "fc2.weight"] * 2)


@pytest.mark.parametrize("word", ["mixer", "re:moonlight"])
def test_a_word_that_takes_nothing_is_refused(word):
    found = align(f.TEXT, f.mllm(), modules=f"attn,{word}")
    for on_mismatch in ("error", "skip"):
        with pytest.raises(AlignmentError, match="takes no tensor") as caught:
            require_complete(found, on_mismatch=on_mismatch)
        assert word in caught.value.message


def test_layers_without_such_a_module_are_said():
    found = align(*pair(HYBRID), modules="attn,mlp", layers="1:2")
    with pytest.raises(AlignmentError, match="attn takes no tensor in the layers that --layers"):
        require_complete(found)
