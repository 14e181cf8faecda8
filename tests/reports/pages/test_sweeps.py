"""Sweeps: a row for each output, curves over what varies."""

import pytest

from drift_merge.errors import SourceError
from drift_merge.reports.pages.page import to_html
from drift_merge.reports.pages.sweeps import describe_sweep, open_sweep
from tests import checkpoints as c
from tests.reports.suite import WORDS, compare
from tests.runs import run_linear


def test_a_sweep_is_a_table_and_curves_over_its_weight(tmp_path):
    pair = c.make_pair(tmp_path, reasoner_sidecars=WORDS, mllm_sidecars=WORDS)
    for weight in (0.5, 0.125):
        run_linear(*pair, tmp_path / "sweep" / f"w{weight}", weight, dtype="float32")
    merges = open_sweep(tmp_path / "sweep")
    measured = {m.path.name: compare(m.path, pair.mllm) for m in merges}
    document = describe_sweep(tmp_path / "sweep", merges, measured, "")
    columns = document["table"]["columns"]
    rows = [dict(zip(columns, row, strict=True)) for row in document["table"]["rows"]]
    assert [row["output"] for row in rows] == ["w0.125", "w0.5"]
    assert [row["weight"] for row in rows] == [0.125, 0.5]
    assert rows[1]["relative norm"] == pytest.approx(4 * rows[0]["relative norm"], rel=1e-4)
    assert document["x_label"] == "weight"
    norms = document["panels"][0]["series"]
    whole = next(s["points"] for s in norms if s["name"] == "all of the tower")
    assert whole == [[row["weight"], row["relative norm"]] for row in rows]
    assert to_html(document)


def test_outputs_that_were_not_measured_say_so(tmp_path):
    pair = c.make_pair(tmp_path)
    run_linear(*pair, tmp_path / "sweep" / "one", 0.5, modules="attn")
    merges = open_sweep(tmp_path / "sweep")
    document = describe_sweep(tmp_path / "sweep", merges, {}, "Not here.")
    assert [p["missing"] for p in document["panels"]] == ["Not here.", "Not here.", ""]


def test_a_directory_without_merges_is_refused(tmp_path):
    with pytest.raises(SourceError, match="holds none"):
        open_sweep(tmp_path)
