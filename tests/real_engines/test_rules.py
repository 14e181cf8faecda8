"""Every rule under every engine equals training by hand in one process on the full batch.

Run with: .ci/engines, or pytest -m engines tests/real_engines where DeepSpeed is installed.
"""

from typing import Any, NamedTuple

import pytest
import torch

from tests.real_engines import toy

pytestmark = [pytest.mark.engines, pytest.mark.timeout(400)]

# An update of float32 gradients is off by about 1e-7 of the gradient; the momentum of three steps
# and tensors whose gradients nearly cancel raise that to the largest seen, 2e-4.
EXACT = 1e-3
# Gradients in a low dtype are off by 2**-8 (bfloat16) or 2**-11, more where they are summed up.
# It is by hand in that dtype too; what an engine computes in another order stays, see NONE.
LOW = {"bf16": 0.12, "fp16": 0.04}
ROUNDED = {"bf16": 2**-8, "fp16": 2**-10}  # twice what storing a gradient in the dtype loses


class Case(NamedTuple):
    engine: str
    world: int = 2
    settings: dict[str, Any] = {}  # noqa: RUF012  (a default, never changed)
    groups: int = 1  # process groups that shards are spread over

    @property
    def dtype(self) -> str:
        """Of the gradients."""
        return self.settings.get("dtype", "fp32")

    @property
    def steps(self) -> int:
        """In a low dtype one: rounding grows from step to step."""
        return toy.STEPS if self.dtype == "fp32" else 1


def zero(stage: int, **settings: Any) -> Case:
    return Case("deepspeed", settings={"stage": stage, **settings}, groups=int(stage > 0))


CASES = {
    "ddp": Case("ddp", groups=0),
    "ddp-buckets": Case("ddp", settings={"is_view": True}, groups=0),
    "fsdp2": Case("fsdp"),
    "fsdp2-bf16": Case("fsdp", settings={"dtype": "bf16"}),
    "fsdp2-no-reshard": Case("fsdp", settings={"is_reshard": False}),
    "fsdp2-zeroed": Case("fsdp", settings={"set_to_none": False}),
    "hsdp-1x2": Case("fsdp", settings={"mesh": [1, 2]}),
    "hsdp-2x1": Case("fsdp", settings={"mesh": [2, 1]}, groups=0),
    "hsdp-2x2": Case("fsdp", 4, {"mesh": [2, 2]}),
    "tp": Case("tensor_parallel"),
    "fsdp2-tp-2x2": Case("fsdp", 4, {"mesh": [2, 2], "tensor_parallel": True}, groups=2),
    "zero0": zero(0),
    "zero1": zero(1),
    "zero2": zero(2),
    "zero3": zero(3),
    "zero0-bf16": zero(0, dtype="bf16"),
    "zero1-bf16": zero(1, dtype="bf16"),
    "zero1-bf16-fp32": Case(
        "deepspeed", settings={"stage": 1, "dtype": "bf16", "accumulate_in": "fp32"}, groups=0
    ),
    "zero2-bf16": zero(2, dtype="bf16"),
    "zero3-bf16": zero(3, dtype="bf16"),
    "zero3-bf16-fp32": zero(3, dtype="bf16", accumulate_in="fp32"),
    "zero2-fp16": zero(2, dtype="fp16", loss_scale=1024),
    "zero3-fp16": zero(3, dtype="fp16", loss_scale=1024),
    "zero2-offload": zero(2, is_offloaded=True),
    "zero3-offload": zero(3, is_offloaded=True),
    "zero2-round-robin": zero(2, options={"round_robin_gradients": True}),
    "zero2-all-reduce": zero(2, options={"reduce_scatter": False}),
    "zero3-no-persistence": zero(3, options={"stage3_param_persistence_threshold": 0}),
    "zero2-optimizer": zero(2, give="optimizer"),
    "zero3-optimizer": zero(3, give="optimizer"),
}
DTYPES = {"fp32": torch.float64, "bf16": torch.bfloat16, "fp16": torch.float16}

by_case = pytest.mark.parametrize("name", CASES)


@pytest.fixture
def results(run_once, name):
    case = CASES[name]
    return run_once(
        "rules", world=case.world, engine=case.engine, steps=case.steps, **case.settings
    )


@by_case
@pytest.mark.parametrize("rule", [None, *toy.RULES])
def test_every_rule_equals_training_by_hand_in_one_process(source, results, name, rule):
    case = CASES[name]
    tolerance = LOW.get(case.dtype, EXACT)
    for rank in results:
        found = rank[str(rule)]
        expected = toy.train_by_hand(
            source, rule, found["data"], dtype=DTYPES[case.dtype], steps=case.steps
        )
        assert toy.largest_error(source, found["weights"], expected) < tolerance


@by_case
def test_the_comparison_would_notice_a_missing_bias(source, results, name):
    case = CASES[name]
    plain = results[0]["None"]
    for rule in toy.RULES:
        expected = toy.train_by_hand(
            source, rule, plain["data"], dtype=DTYPES[case.dtype], steps=case.steps
        )
        tolerance = LOW.get(case.dtype, EXACT)
        assert toy.largest_error(source, plain["weights"], expected) > 4 * tolerance


@by_case
def test_a_step_makes_one_reduction_of_sums_for_each_group(results, name):
    case = CASES[name]
    for rank in results:
        for rule in toy.RULES:
            for shapes in rank[rule]["reductions"][1:]:  # the first step also checks weights
                assert len(shapes) == case.groups
                assert all(len(shape) == 2 and shape[1] <= 4 for shape in shapes)  # rows of sums


@by_case
def test_ranks_step_together_and_micro_steps_are_not_biased(results, name):
    assert {rank[rule]["handle_steps"] for rank in results for rule in toy.RULES} == {
        CASES[name].steps
    }


def num_copies(case: Case, tensor: str) -> int:
    """How many ranks hold each element of a gradient."""
    if case.engine == "tensor_parallel" or "tensor_parallel" in case.settings:
        return 1 if "mlp" in tensor else 2
    mesh = case.settings.get("mesh", [1])
    return mesh[0] if len(mesh) > 1 else 1


SHARDED = [name for name, case in CASES.items() if case.groups]


@pytest.mark.parametrize("name", SHARDED)
def test_each_rank_reads_its_slice_of_delta_and_no_more(results, name):
    case = CASES[name]
    reads = [rank["adaptive_cosine"]["reads"] for rank in results]
    tensors = set().union(*reads)
    assert len(tensors) == 10 * toy.LAYERS
    for tensor in tensors:
        masks = [found[tensor] > 0 for found in reads if tensor in found]
        readers = sum(mask.int() for mask in masks)
        copies = num_copies(case, tensor)
        assert readers.min() == readers.max() == copies  # each element by one rank of each copy


@pytest.mark.parametrize("name", ["zero2-bf16", "zero3-bf16-fp32", "zero1-bf16-fp32", "zero2-fp16"])
# Not `sign`: rounding hides on which side of 0 small entries of the gradient were.
@pytest.mark.parametrize("rule", [rule for rule in toy.RULES if rule != "sign"])
def test_the_bias_is_the_formula_of_the_engines_own_gradient(source, results, name, rule):
    """Sharper than by hand in a low dtype: both runs have the same gradient before the bias."""
    deltas, start = toy.deltas(source), dict(toy.load(source).named_parameters())
    for rank in results:
        for tensor, delta in deltas.items():
            plain, biased = (rank[r]["weights"][tensor].double() for r in ("None", rule))
            origin = start[tensor].detach().double()
            gradient = (origin - plain) / toy.LEARNING_RATE
            change = (plain - biased) / toy.LEARNING_RATE
            found = toy.coefficient(rule, gradient, delta, origin)
            bias = -toy.ALPHA * found * delta if "_proj" in tensor else torch.zeros_like(delta)
            rounding = ROUNDED[CASES[name].dtype] * max(gradient.norm(), (gradient + bias).norm())
            assert (change - bias).norm() <= rounding
