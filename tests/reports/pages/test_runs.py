"""Training runs: every kind of log that is read, and what is made of it."""

import json

import pytest

from drift_merge.errors import CheckpointError, SourceError
from drift_merge.reports.pages.page import data_of, to_html
from drift_merge.reports.pages.runs import describe_run, read_history

HISTORY = [
    {
        "step": 1,
        "loss": 2.0,
        "drift/cosine": 0.25,
        "drift/attn/cosine": 0.5,
        "drift/attn/alpha": 1.0,
    },
    {
        "step": 2,
        "loss": 1.5,
        "drift/cosine": 0.125,
        "drift/attn/cosine": 0.25,
        "drift/distance": 0.1,
    },
    {"step": 4, "loss": float("nan"), "drift/cosine": 0.0625, "drift/bias_ratio": 2.0},
]
HISTORY[0]["drift/attn/alpha"] = 1.0
HISTORY[1]["drift/distance"] = 0.1


def write_csv(path):
    columns = list(dict.fromkeys(key for row in HISTORY for key in row))
    rows = [",".join(str(row.get(key, "")) for key in columns) for row in HISTORY]
    path.write_text("\n".join([",".join(columns), *rows]) + "\n")


def write_state(path):
    log = [*HISTORY, {"train_runtime": 3.0}]
    path.write_text(json.dumps({"log_history": log}))


def write_lines(path):
    path.write_text("\n".join(json.dumps(row) for row in HISTORY) + "\n")


WRITERS = {
    "train.csv": write_csv,
    "trainer_state.json": write_state,
    "checkpoint-4/trainer_state.json": write_state,
    "metrics.csv": write_csv,
    "metrics.jsonl": write_lines,
}


def series_of(document):
    return {
        panel["key"]: {series["name"]: series["points"] for series in panel["series"]}
        for panel in document["panels"]
    }


@pytest.mark.parametrize("name", WRITERS)
def test_every_kind_of_log_gives_the_same_curves(tmp_path, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    WRITERS[name](tmp_path / name)
    document = data_of(to_html(describe_run(tmp_path, read_history(tmp_path), {})))
    assert series_of(document) == {
        "loss": {"all": [[1, 2.0], [2, 1.5], [4, None]]},
        "cosine": {"all": [[1, 0.25], [2, 0.125], [4, 0.0625]], "attn": [[1, 0.5], [2, 0.25]]},
        "bias_ratio": {"all": [[4, 2.0]]},
        "distance": {"all": [[2, 0.1]]},
        "alpha": {"attn": [[1, 1.0]]},
    }
    assert "1 values are NaN" in " ".join(document["notes"])


def test_the_last_checkpoint_is_read(tmp_path):
    for step in (4, 10, 9):
        (tmp_path / f"checkpoint-{step}").mkdir()
        log = [{"step": step, "loss": 1.0}]
        state = json.dumps({"log_history": log})
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(state)
    assert [log["step"] for log in read_history(tmp_path)] == [10]


def test_a_long_run_is_thinned_and_keeps_its_ends(tmp_path):
    lines = [json.dumps({"step": step, "loss": step / 2}) for step in range(9_000)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    points = series_of(describe_run(tmp_path, read_history(tmp_path), {}))["loss"]["all"]
    assert len(points) == 2000
    assert (points[0], points[-1]) == ([0, 0.0], [8_999, 4_499.5])


def test_a_run_without_the_prior_says_what_it_has_not_logged(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    panels = describe_run(tmp_path, read_history(tmp_path), {})["panels"]
    assert [panel["key"] for panel in panels if panel["missing"]] == [
        "cosine",
        "bias_ratio",
        "distance",
        "alpha",
    ]


@pytest.mark.parametrize("text", ["", "{", '{"step": 1, "accuracy": 1.0}\n', "[1, 2]\n"])
def test_a_log_that_says_nothing_is_refused(tmp_path, text):
    (tmp_path / "metrics.jsonl").write_text(text)
    with pytest.raises(CheckpointError):
        read_history(tmp_path)


def test_what_is_no_run_is_refused_with_what_would_be_one(tmp_path):
    with pytest.raises(SourceError, match=r"metrics\.jsonl") as error:
        read_history(tmp_path)
    assert "handle.metrics()" in error.value.remedy
