"""Runs beyond single rules: clipping, reports, saved states, removal, and what is refused."""

import pytest
import torch

import drift_merge
from tests.real_engines import toy

pytestmark = [pytest.mark.engines, pytest.mark.timeout(400)]

EXACT = 1e-3  # see test_rules
ENGINES = {
    "ddp": {"engine": "ddp"},
    "fsdp2": {"engine": "fsdp"},
    "zero0": {"engine": "deepspeed", "stage": 0},
    "zero1": {"engine": "deepspeed", "stage": 1},
    "zero2": {"engine": "deepspeed", "stage": 2},
    "zero3": {"engine": "deepspeed", "stage": 3},
    "zero2-offload": {"engine": "deepspeed", "stage": 2, "is_offloaded": True},
    "zero3-offload": {"engine": "deepspeed", "stage": 3, "is_offloaded": True},
    "zero1-bf16-fp32": {
        "engine": "deepspeed",
        "stage": 1,
        "dtype": "bf16",
        "accumulate_in": "fp32",
        "steps": 1,
    },
}
CLIP = 1.5  # about half of the norms that occur
SHARDED = ("fsdp2", "zero1", "zero2", "zero3")


@pytest.mark.parametrize("name", [name for name in ENGINES if name not in ("ddp", "fsdp2")])
def test_deepspeed_clips_what_has_been_biased(source, run_once, name):
    settings = ENGINES[name]
    is_low = "dtype" in settings
    results = run_once("rules", only=["adaptive_cosine"], clip=CLIP, **settings)
    expected = toy.train_by_hand(
        source,
        "adaptive_cosine",
        2,
        clip=CLIP,
        is_clipped_first=name == "zero0",  # whose optimizer is torch's own
        steps=settings.get("steps", toy.STEPS),
        dtype=torch.bfloat16 if is_low else torch.float64,
    )
    for rank in results:
        found = rank["adaptive_cosine"]["weights"]
        assert toy.largest_error(source, found, expected) < (0.12 if is_low else EXACT)


@pytest.mark.parametrize("name", ["ddp", *SHARDED])
def test_all_ranks_report_what_a_single_process_does(source, run_once, name):
    first, second = (rank["reports"] for rank in run_once("report", **ENGINES[name]))
    assert first == second
    for found, expected in zip(first, single_reports(source), strict=True):
        assert found["steps"] == expected["steps"]
        assert found["coverage"] == expected["coverage"]
        for key in ("cosine", "bias_ratio", "coefficient", "distance"):
            assert found[key] == pytest.approx(expected[key], rel=1e-3, abs=1e-5)
            assert found[f"drift/attn/{key}"] == pytest.approx(
                expected["modules"]["attn"][key], rel=1e-3, abs=1e-5
            )


def single_reports(source):
    """The reports of one process on the full batch."""
    model = toy.load(source)
    optimizer = torch.optim.SGD(model.parameters(), lr=toy.LEARNING_RATE, momentum=toy.MOMENTUM)
    handle = drift_merge.attach(model, source / "prior", alpha=toy.ALPHA, optimizer=optimizer)
    reports = []
    for step in range(toy.STEPS):
        model(toy.batches(step, 2).flatten(0, 2)).backward()
        optimizer.step()
        optimizer.zero_grad()
        reports.append(handle.report())
    return reports


@pytest.mark.parametrize("name", SHARDED)
@pytest.mark.parametrize("rule", ["adaptive_cosine", "anchor"])
def test_a_run_resumed_from_a_saved_state_goes_on_bit_for_bit(run_once, name, rule):
    for rank in run_once("resume", rule=rule, **ENGINES[name]):
        assert rank["state"]["steps"] == 1
        assert all(torch.equal(rank["parts"][n], w) for n, w in rank["whole"].items())
        assert rank["parts_report"] == rank["whole_report"]


@pytest.mark.parametrize("name", ["fsdp2", "zero2", "zero3"])
def test_after_remove_training_is_plain_again_bit_for_bit(run_once, name):
    for rank in run_once("remove", **ENGINES[name]):
        assert all(torch.equal(rank["removed"][n], w) for n, w in rank["plain"].items())


@pytest.mark.parametrize("name", SHARDED)
def test_other_weights_than_the_priors_are_refused_on_every_rank(run_once, name):
    """The last element differs, which only one rank holds."""
    results = run_once("changed_weights", **ENGINES[name])
    for rank in results:
        assert rank["kind"] == "VerificationError"
        assert toy.CHANGED.split("language_model.")[1] in rank["error"]
        assert "1 of 20 tensors differ" in rank["error"]
    assert results[0] == results[1]


@pytest.mark.parametrize("stage", [2, 3])
def test_a_step_that_deepspeed_skips_is_not_counted(run_once, stage):
    for rank in run_once("overflow", stage=stage):
        assert rank["skipped"] > 0
        assert rank["steps"] == rank["taken"] > 0
        assert rank["is_finite"]


def test_apply_by_hand_under_fsdp2_equals_the_hook(source, run_once):
    expected = toy.train_by_hand(source, "adaptive_cosine", 2)
    for rank in run_once("apply_by_hand"):
        assert toy.largest_error(source, rank["weights"], expected) < EXACT


def test_gradients_that_are_still_sums_over_ranks_are_reduced_first(source, run_once):
    start, deltas = dict(toy.load(source).named_parameters()), toy.deltas(source)
    for rank in run_once("partial_gradient"):
        for name, found in rank["gradients"].items():
            expected = torch.ones(found.shape, dtype=torch.float64)
            if "_proj" in name:
                c = toy.coefficient("gradnorm", expected, deltas[name], start[name])
                expected = expected - toy.ALPHA * c * deltas[name]
            torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("fully_shard after attach", "after attach"),
        ("fully_shard of a layer after attach", "after attach"),
        ("ZeRO-2 after attach", "after attach"),
        ("ZeRO-3 after attach", "after attach"),
        ("attach while gathered", "reshard"),
        ("microbatch under FSDP2", "when='step'"),
        ("the optimizer of another model", "does not hold"),
        ("Muon under ZeRO-2", "with any optimizer but Muon"),
    ],
)
def test_what_would_lose_the_bias_is_refused(run_once, what, words):
    for rank in run_once("refusals"):
        assert rank[what] is not None, "nothing was said"
        assert words in rank[what]
