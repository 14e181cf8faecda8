"""Masks of the methods that drop at random: by seed, by tensor, by reasoner."""

import numpy as np
import pytest

from tests import checkpoints as c
from tests.merges.suite import (
    CASES,
    MERGED,
    RANDOM,
    in_memory,
    name_of,
    run_merge,
    write_sources,
)

RANDOM_CASES = [case for case in CASES if case.name in RANDOM]


random = pytest.mark.parametrize("case", RANDOM_CASES, ids=name_of)


@random
def test_masks_depend_on_the_seed(case, sources, tmp_path):
    options = {"density": 0.5}
    for seed in (0, 1):
        run_merge(case, sources, tmp_path / str(seed), seed=seed, options=options)
        expected = in_memory(case, sources, seed=seed, **options)
        assert c.read_tensors(tmp_path / str(seed)) == expected
    zero, one = (c.read_tensors(tmp_path / name) for name in "01")
    same = [name for name in zero if MERGED.match(name) and zero[name] == one[name]]
    assert same == []


SQUARES = [
    f"model.layers.{layer}.self_attn.{name}.weight"
    for layer in range(2)
    for name in ("q_proj", "o_proj")
]


@random
def test_every_tensor_and_every_reasoner_has_a_mask_of_its_own(case, tmp_path):
    # A base and an mllm of 0: an entry that is not 0 was kept.
    sources = write_sources(tmp_path, dtypes=("F32", "F32", "F32", "F32"))
    ones = {name: c.store(np.ones((c.HIDDEN, c.HIDDEN)), "F32") for name in SQUARES}
    zeros = {name: c.store(tensor.values * 0, "F32") for name, tensor in ones.items()}
    changes = dict.fromkeys(sources.reasoners, ones) | {sources.mllm: zeros, sources.base: zeros}
    for path, values in changes.items():
        c.write_shard(path / "model.safetensors", c.read_tensors(path) | values)
    masks = {}
    for number in (0, 1):
        weights = (1.0, 0.0) if number == 0 else (0.0, 1.0)
        out = tmp_path / str(number)
        run_merge(case, sources, out, weights=weights, options={"density": 0.5})
        found = c.read_tensors(out)
        for name in SQUARES:
            masks[name, number] = found[name].values != 0
    for mask in masks.values():
        assert 0.3 < mask.mean() < 0.7
    for one, mask in masks.items():
        for other, another in masks.items():
            assert one == other or 0.3 < (mask == another).mean() < 0.7, (one, other)
