"""`drift-prior train` before it needs transformers: options, data, plan, unfinished runs."""

import json

import pytest

from drift_merge.errors import OutputError
from drift_merge.trainers.sft.memory import require_disk
from drift_merge.trainers.sft.request import (
    TrainingRequest,
    enter_run,
    last_checkpoint,
    prepare_training,
    run_of,
)
from tests import checkpoints as c
from tests.runs import run_prior
from tests.trainers.sft.pictures import png


@pytest.fixture
def inputs(tmp_path):
    pair = c.make_pair(tmp_path)
    run_prior(*pair, tmp_path / "prior")
    (tmp_path / "one.png").write_bytes(png())
    line = {"image": "one.png", "question": "Q", "answer": "A"}
    (tmp_path / "data.jsonl").write_text((json.dumps(line) + "\n") * 10)
    return tmp_path


def words(inputs, *more):
    data = ("--data", str(inputs / "data.jsonl"))
    return ("drift-prior", "train", str(inputs / "mllm"), *data, "-o", str(inputs / "out"), *more)


@pytest.mark.parametrize("given", [(), ("--prior", "prior", "--no-prior")])
def test_a_prior_is_given_or_refused_by_name(call, inputs, given):
    result = call(*words(inputs, *given))
    assert result.code == 2
    assert "--no-prior" in result.err


def test_a_dry_run_says_what_would_be_done_and_writes_nothing(call, inputs):
    before = sorted(inputs.iterdir())
    more = ("--accumulation", "3", "--epochs", "2", "--alpha", "attn=1,mlp=0.5")
    prior = ("--prior", str(inputs / "prior"))
    result = call(*words(inputs, *prior, *more, "--dry-run", "--json"))
    assert result.code == 0, result.err
    plan = json.loads(result.out)
    assert plan["num_steps"] == 8  # 4 steps an epoch, the last one of a single example
    assert plan["num_examples"] == 10
    assert plan["alpha"] == {"attn": 1.0, "mlp": 0.5}
    assert sorted(inputs.iterdir()) == before
    assert "8" in call(*words(inputs, *prior, *more, "--dry-run")).out


@pytest.mark.parametrize("alpha", ["strong", "attn=", "attn=1,mlp"])
def test_an_alpha_that_is_no_number_is_a_usage_error(call, inputs, alpha):
    result = call(*words(inputs, "--no-prior", "--alpha", alpha))
    assert result.code == 2
    assert alpha in result.err


@pytest.mark.parametrize(
    ("spoil", "code"),
    [
        (lambda at: (at / "one.png").unlink(), 3),
        (lambda at: (at / "data.jsonl").write_text('{"messages": []}'), 2),
        (lambda at: (at / "data.jsonl").unlink(), 3),
        (lambda at: (at / "data.jsonl").write_text("{}"), 2),
        (lambda at: (at / "mllm" / "model.safetensors").write_bytes(b"x"), 5),
        (lambda at: (at / "out").mkdir() or (at / "out" / "x").touch(), 6),
    ],
    ids=["image", "turns", "data", "line", "mllm", "out"],
)
def test_a_bad_input_is_found_before_any_work(call, inputs, spoil, code):
    spoil(inputs)
    result = call(*words(inputs, "--no-prior", "--dry-run"))
    assert result.code == code, result.err


def test_steps_override_epochs(inputs):
    request = TrainingRequest(
        str(inputs / "mllm"), inputs / "data.jsonl", None, epochs=0.5, batch_size=3
    )
    assert prepare_training(request).num_steps == 2
    request = TrainingRequest(str(inputs / "mllm"), inputs / "data.jsonl", None, steps=7)
    assert prepare_training(request).num_steps == 7


def prepared_with(inputs, **changes):
    return prepare_training(
        TrainingRequest(str(inputs / "mllm"), inputs / "data.jsonl", None, **changes)
    )


def test_an_unfinished_run_is_continued_only_on_request_and_only_by_the_same_one(inputs):
    run, prepared = run_of(inputs / "out"), prepared_with(inputs)
    assert enter_run(run, prepared, resume=False) is None
    with pytest.raises(OutputError, match="unfinished run, without a checkpoint") as raised:
        enter_run(run, prepared, resume=False)
    assert "--resume" in raised.value.remedy
    for step, is_whole in ((5, True), (10, True), (15, False)):
        (run / f"checkpoint-{step}").mkdir()
        if is_whole:
            (run / f"checkpoint-{step}" / "whole").touch()
    assert last_checkpoint(run) == run / "checkpoint-10"
    with pytest.raises(OutputError, match="up to step 10 of 10"):
        enter_run(run, prepared, resume=False)
    with pytest.raises(OutputError, match="other inputs or options"):
        enter_run(run, prepared_with(inputs, learning_rate=1.0), resume=True)
    assert enter_run(run, prepared, resume=True) == run / "checkpoint-10"
    assert not (run / "checkpoint-15").exists()  # it was being written when the run died


def test_resuming_a_run_that_never_saved_begins_anew(inputs):
    run = run_of(inputs / "out")
    assert enter_run(run, prepared_with(inputs), resume=False) is None
    (run / "checkpoint-5").mkdir()
    assert enter_run(run, prepared_with(inputs, seed=1), resume=True) is None
    assert not (run / "checkpoint-5").exists()


def test_a_changed_picture_is_another_run_and_workers_are_not(inputs):
    run = run_of(inputs / "out")
    enter_run(run, prepared_with(inputs), resume=False)
    (run / "checkpoint-5").mkdir()
    (run / "checkpoint-5" / "whole").touch()
    same = prepared_with(inputs, workers=2, save_total_limit=1)
    assert enter_run(run, same, resume=True) == run / "checkpoint-5"
    (inputs / "one.png").write_bytes(png((0, 0, 255)))
    with pytest.raises(OutputError, match="other inputs or options"):
        enter_run(run, prepared_with(inputs), resume=True)


@pytest.mark.parametrize(
    "given",
    [
        ("--lora", "4", "--train-all"),
        ("--fsdp",),
        ("--max-length", "0"),
        ("--optimizer", "sgd"),
        ("--save-total-limit", "0"),
    ],
)
def test_options_that_exclude_each_other_are_a_usage_error(call, inputs, given):
    result = call(*words(inputs, "--no-prior", "--dry-run", *given))
    assert result.code == 2, result.err


def test_a_dry_run_tells_memory_and_disk(call, inputs, monkeypatch):
    more = ("--no-prior", "--lora", "2", "--max-length", "64")
    told = json.loads(call(*words(inputs, *more, "--dry-run", "--json")).out)
    estimate = told["estimate"]
    parts = ("weights", "gradients", "optimizer", "activations")
    assert estimate["memory"]["total"] == sum(estimate["memory"][part] for part in parts)
    assert estimate["memory"]["gradients"] == 4 * estimate["trained_elements"]
    assert told["learning_rate"] == 1e-4
    shown = call(*words(inputs, *more, "--dry-run")).out
    assert all(word in shown for word in (*parts, "checkpoints", "output"))


def test_what_cannot_fit_is_refused_with_what_would(call, inputs, monkeypatch):
    monkeypatch.setattr("drift_merge.cli.commands.train.room_of", lambda *_: 1000)
    result = call(*words(inputs, "--no-prior", "--dry-run"))
    assert result.code == 2
    assert "cannot fit" in result.err


def test_a_disk_without_room_is_refused_before_the_first_step(inputs, monkeypatch):
    monkeypatch.setattr("drift_merge.trainers.sft.memory.free_bytes", lambda _: 1000)
    prepared = prepared_with(inputs)
    with pytest.raises(OutputError, match="are free") as raised:
        require_disk(prepared, run_of(inputs / "out"))
    assert "--save-total-limit" in raised.value.remedy
