"""`drift-prior train` for real: on a tiny LLaVA with pictures, killed and resumed."""

import csv
import json
import shutil
import subprocess

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("PIL")

from tests import checkpoints as c
from tests.real_trainers import tiny
from tests.real_trainers.train_command.commands import ENVIRONMENT, command, kill_at, run

pytestmark = [
    pytest.mark.engines,
    pytest.mark.filterwarnings("default"),
    pytest.mark.timeout(600),
]


@pytest.fixture(scope="module")
def undisturbed(setup, tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    run(command(setup, out, "--schedule", "linear", "--save-steps", "2", "-q"))
    return out


def test_the_output_is_a_complete_checkpoint_with_the_course_of_its_training(setup, undisturbed):
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model, told = AutoModelForImageTextToText.from_pretrained(undisturbed, output_loading_info=True)
    assert not any(told.values())
    assert AutoProcessor.from_pretrained(undisturbed).chat_template == tiny.TEMPLATE
    before = dict(setup.model().named_parameters())
    moved = {
        name for name, p in model.named_parameters() if not torch.equal(p.float(), before[name])
    }
    tower = {name for name in before if "language_model" in name or "lm_head" in name}
    assert moved == tower  # vision tower and projector are frozen
    rows = list(csv.DictReader((undisturbed / "train.csv").open()))
    assert [int(row["step"]) for row in rows] == list(range(1, 9))
    assert float(rows[-1]["loss"]) < float(rows[0]["loss"])
    alphas = [float(row["drift/alpha"]) for row in rows]
    assert alphas == pytest.approx([1 - step / 8 for step in range(8)])
    for column in ("drift/cosine", "drift/bias_ratio", "learning_rate"):
        assert all(row[column] for row in rows)
    manifest = json.loads((undisturbed / "train.json").read_text())
    assert manifest["num_steps"] == 8
    assert manifest["change_kept"] == pytest.approx(1.0)  # float32, as the mllm is
    assert not undisturbed.with_name("out.run").exists()
    assert not undisturbed.with_name("out.partial").exists()


def test_everything_beside_the_weights_is_the_mllms(setup, undisturbed):
    before, after = c.read_files(setup.mllm), c.read_files(undisturbed)
    for name in ("tokenizer.json", "chat_template.jinja", "processor_config.json"):
        assert after[name] == before[name]


KILLED_BEFORE_THE_OUTPUT = """
import os
from drift_merge.cli.prior import main
from drift_merge.trainers.sft import run
run.write_output = lambda *_: os._exit(9)
main()
"""
KILLED = {
    "full": ("--schedule", "linear"),
    "one checkpoint": ("--save-total-limit", "1"),
    "lora": ("--lora", "4"),
    "lora, one checkpoint, workers": ("--lora", "4", "--save-total-limit", "1", "--workers", "1"),
    "8 bits": ("--optimizer", "adamw_8bit"),
}


@pytest.mark.parametrize("name", KILLED)
def test_a_killed_and_resumed_run_gives_the_same_bytes(setup, undisturbed, tmp_path, name):
    if "8" in name:
        pytest.importorskip("bitsandbytes")
    out, whole = tmp_path / "out", undisturbed
    more = ("--save-steps", "2", "-q", *KILLED[name])
    words = command(setup, out, *more)
    if name != "full":
        whole = tmp_path / "whole"
        run(command(setup, whole, *more))
    kill_at(words, tmp_path / "out.run" / "checkpoint-4" / "whole", tmp_path / "log")
    assert not out.exists()
    kept = len(list((tmp_path / "out.run").glob("checkpoint-*/whole")))
    assert kept <= (1 if "--save-total-limit" in more else 2) + 1
    refused = run(words, code=6)
    assert "add --resume" in refused.stderr
    other = run([*words, "--resume", "--seed", "5"], code=6)
    assert "other inputs or options" in other.stderr
    run([*words, "--resume"])
    ours, theirs = c.read_files(out), c.read_files(whole)
    assert ours.keys() == theirs.keys()
    for file, data in theirs.items():
        assert ours[file] == data, file


@pytest.mark.parametrize(("prior", "steps"), [(True, 8), (False, 8), (True, 6)])
def test_a_run_killed_after_its_last_step_makes_no_other(
    setup, undisturbed, tmp_path, prior, steps
):
    """8 steps are no whole number of epochs, so that the trainer itself would go on; 6 are."""
    out, whole = tmp_path / "out", undisturbed
    more = ("--save-steps", "2", "-q", *(("--schedule", "linear") if prior else ()))
    more = (*more, "--steps", str(steps))
    words = command(setup, out, *more, prior=prior)
    killed = [*words[:2], KILLED_BEFORE_THE_OUTPUT, *words[3:]]
    assert subprocess.run(killed, check=False, env=ENVIRONMENT).returncode == 9
    assert not out.exists()
    assert (tmp_path / "out.run" / f"checkpoint-{steps}" / "whole").exists()
    run([*words, "--resume"])
    if not (prior and steps == 8):
        whole = tmp_path / "whole"
        run(command(setup, whole, *more, prior=prior))
    ours, theirs = c.read_files(out), c.read_files(whole)
    assert ours.keys() == theirs.keys()
    assert [file for file in theirs if ours[file] != theirs[file]] == []


def test_without_a_prior_it_is_plain_training(setup, tmp_path):
    done = run(command(setup, tmp_path / "out", "--json", prior=False))
    told = json.loads(done.stdout)
    assert told["output"] == str(tmp_path / "out")
    assert told["report"] is None
    header = (tmp_path / "out" / "train.csv").read_text().splitlines()[0]
    assert "loss" in header
    assert "drift" not in header
    assert "cosine" not in done.stderr


def test_bf16_and_another_output_dtype_and_everything_trained(setup, tmp_path):
    out = tmp_path / "out"
    more = ("--precision", "bf16", "--dtype", "bfloat16", "--train-all", "--steps", "1")
    done = run(command(setup, out, *more))
    tensors = c.read_tensors(out)
    assert {tensor.dtype for tensor in tensors.values()} == {"BF16"}
    assert "Training: step 1 of 1" in done.stderr
    assert done.stdout == f"{out}\n"


def test_what_a_16_bit_output_rounds_away_is_measured_and_told(setup, tmp_path):
    small = setup._replace(mllm=tmp_path / "mllm")
    setup.model().to(torch.bfloat16).save_pretrained(small.mllm)
    tiny.write_llava_processor(small.mllm)
    for path in setup.mllm.parent.glob("*.[pj]*"):
        shutil.copy(path, tmp_path)
    out = tmp_path / "out"
    done = run(command(small, out, "--lr", "1e-5", "--warmup", "0", prior=False))
    kept = json.loads((out / "train.json").read_text())["change_kept"]
    assert 0 < kept < 0.9
    assert f"keeps {kept:.0%} of what was learned" in done.stderr
    drawn = tmp_path / "drawn"
    by_chance = ("--lr", "1e-5", "--warmup", "0", "--round", "stochastic")
    run(command(small, drawn, *by_chance, prior=False))
    found = json.loads((drawn / "train.json").read_text())["change_kept"]
    assert abs(found - 1.0) < abs(kept - 1.0) / 4
    exact = tmp_path / "exact"
    run(command(small, exact, "--lr", "1e-5", "--warmup", "0", "--dtype", "float32", prior=False))
    assert json.loads((exact / "train.json").read_text())["change_kept"] == pytest.approx(1.0)


@pytest.mark.parametrize("spoil", ["template", "processor", "weights"])
def test_a_model_that_cannot_be_trained_so_is_refused_before_training(setup, tmp_path, spoil):
    copy = setup._replace(mllm=tmp_path / "mllm")
    shutil.copytree(setup.mllm, copy.mllm)
    (tmp_path / "data.jsonl").write_text((setup.mllm.parent / "data.jsonl").read_text())
    for picture in setup.mllm.parent.glob("*.png"):
        shutil.copy(picture, tmp_path)
    code, words = {
        "template": (5, "no chat template"),
        "processor": (5, "processor"),
        "weights": (1, "prior"),
    }[spoil]
    if spoil == "template":
        (copy.mllm / "chat_template.jinja").unlink()
    elif spoil == "processor":
        (copy.mllm / "tokenizer.json").unlink()
    else:
        model = copy.model()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.5)
        model.save_pretrained(copy.mllm)
    failed = subprocess.run(
        command(copy, tmp_path / "out"),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env=ENVIRONMENT,
    )
    assert words in failed.stderr
    assert failed.returncode not in (0, 70), failed.stderr[-2000:]
    assert failed.returncode == code
    assert not list(tmp_path.glob("out*"))
