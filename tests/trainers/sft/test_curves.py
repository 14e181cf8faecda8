"""The course of a training as CSV and PNG."""

import sys

import pytest

from drift_merge.trainers.sft.curves import to_csv, to_png

HISTORY = [
    {"step": 1, "epoch": 0.5, "loss": 2.0, "learning_rate": 0.1, "drift/cosine": 0.25},
    {"step": 2, "epoch": 1.0, "loss": 1.5, "learning_rate": 0.0, "drift/cosine": 0.5},
    {"step": 2, "epoch": 1.0, "train_runtime": 3.0, "train_loss": 1.75},
]


def test_the_csv_has_one_row_for_each_logged_step():
    assert to_csv(HISTORY).decode() == (
        "step,epoch,loss,learning_rate,drift/cosine\n1,0.5,2.0,0.1,0.25\n2,1.0,1.5,0.0,0.5\n"
    )


def test_a_training_that_logged_nothing_gives_a_header_only():
    assert to_csv([]) == b"\n"


@pytest.mark.filterwarnings("default")
def test_the_picture_is_the_same_for_the_same_numbers():
    pytest.importorskip("matplotlib")
    one = to_png(HISTORY, title="t")
    assert one is not None
    assert one.startswith(b"\x89PNG")
    assert one == to_png(HISTORY, title="t")
    assert one != to_png(HISTORY[:1], title="t")


def test_without_matplotlib_there_is_no_picture_and_no_error(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert to_png(HISTORY, title="t") is None
