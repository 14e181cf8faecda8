"""What a layer is made of, where its names are not llama's: read off names of real checkpoints."""

import pytest

from drift_merge.names.layers.structure import named_by_class
from drift_merge.names.modules import classify
from tests.names.layers.blocks import (
    ATTENTION_BLOCK,
    BERT,
    GEMMA_3N,
    MAMBA_BLOCK,
    MLP_BLOCK,
    MOE_BLOCK,
    OPT,
    E,
    H,
    I,
)


def classes(tails):
    return {
        tail: classify(f"layers.0.{canonical}") for tail, canonical in named_by_class(tails).items()
    }


@pytest.mark.parametrize(
    ("tails", "counts"),
    [
        (OPT, {"attn": 4, "mlp": 4, "norm": 2}),
        (BERT, {"attn": 4, "mlp": 2, "norm": 2}),
        (MAMBA_BLOCK, {"mixer": 6, "norm": 2}),
        (MLP_BLOCK, {"mlp": 2, "norm": 1}),
        (ATTENTION_BLOCK, {"attn": 4, "norm": 1}),
        (MOE_BLOCK, {"mlp": 2 + E, "norm": 1}),
        (GEMMA_3N, {"attn": 1, "mlp": 1, "other": 5}),
    ],
    ids=["opt", "bert", "mamba", "mlp", "attention", "experts", "gemma3n"],
)
def test_every_tensor_of_a_layer_has_its_class(tails, counts):
    found = list(classes(tails).values())
    assert {word: found.count(word) for word in set(found)} == counts


@pytest.mark.parametrize("tails", [OPT, BERT, MAMBA_BLOCK, MLP_BLOCK, ATTENTION_BLOCK, MOE_BLOCK])
def test_a_name_that_says_its_class_stays(tails):
    once = {name: tails[tail] for tail, name in named_by_class(tails).items()}
    assert len(once) == len(tails)
    assert named_by_class(once) == {name: name for name in once}


def test_any_two_matrices_there_and_back_are_an_mlp_whatever_they_are_called():
    tails = {"self_attn.q_proj.weight": (H, H), "wide.weight": (I, H), "back.weight": (H, I)}
    assert classes(tails)["wide.weight"] == classes(tails)["back.weight"] == "mlp"
    assert classes({**tails, "wide.weight": (I, 7)})["wide.weight"] == "other"


def test_molmo_says_by_name_what_its_shapes_leave_open():
    tails = {
        "att_proj.weight": (I, H),  # as wide as the mlp: shapes alone would make it one
        "attn_out.weight": (H, H),
        "ff_proj.weight": (2 * I, H),
        "ff_out.weight": (H, I),
    }
    assert list(classes(tails).values()) == ["attn", "attn", "mlp", "mlp"]
