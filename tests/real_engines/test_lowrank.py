"""A low-rank prior under engines that shard: each rank takes its part of the factors' product.

Run with: .ci/engines, or pytest -m engines tests/real_engines where DeepSpeed is installed.
"""

import shutil

import pytest

from tests.real_engines import toy
from tests.runs import run_prior

pytestmark = [pytest.mark.engines, pytest.mark.timeout(400)]

RULES = ("absolute", "adaptive_cosine")
EXACT = 1e-3  # as in test_rules
CASES = {
    "fsdp2": ("fsdp", {}),
    "zero2": ("deepspeed", {"stage": 2}),
    "zero3": ("deepspeed", {"stage": 3}),
}


@pytest.fixture(scope="module")
def low(source, tmp_path_factory):
    """The toy with the two leading directions of every matrix in the place of its prior."""
    directory = tmp_path_factory.mktemp("low")
    shutil.copy(source / "mllm.pt", directory)
    sides = (source / "reasoner", source / "mllm")
    run_prior(*sides, directory / "prior", modules="attn,mlp,norm", rank=2)
    return directory


@pytest.mark.parametrize("name", CASES)
def test_every_rank_adds_its_part_of_the_product(name, low, source, run_once):
    engine, settings = CASES[name]
    results = run_once("rules", source=str(low), world=2, engine=engine, only=RULES, **settings)
    for rank in results:
        for rule in RULES:
            found = rank[rule]
            expected = toy.train_by_hand(low, rule, found["data"])
            assert toy.largest_error(low, found["weights"], expected) < EXACT
            # All of delta is another prior: the comparison would notice.
            dense = toy.train_by_hand(source, rule, found["data"])
            assert toy.largest_error(low, found["weights"], dense) > 4 * EXACT
            # k and v have one row, and so one direction: they are stored as they are.
            whole = {"k_proj.weight", "v_proj.weight", "bias"}
            assert all(tensor.endswith(tuple(whole)) for tensor in found["reads"]), found["reads"]
