"""Pages: their numbers are the manifest's, and nothing on them leaves the file."""

import json
import re

import pytest

from drift_merge.errors import CheckpointError, OutputError
from drift_merge.merges.manifest import open_merge
from drift_merge.priors.deltas import open_deltas
from drift_merge.priors.manifest import open_prior
from drift_merge.reports.pages.merges import describe_comparison, describe_merge
from drift_merge.reports.pages.page import data_of, to_html, write_page
from drift_merge.reports.pages.priors import describe_prior
from tests.reports.suite import compare, make


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make(tmp_path_factory.mktemp("pages") / "made")


def cells_of(document):
    return {cell["name"]: cell for part in document["parts"] for cell in part["cells"]}


def test_the_page_of_a_prior_has_the_numbers_of_its_manifest(made):
    prior = open_prior(made.prior)
    document = data_of(to_html(describe_prior(prior)))
    cells = cells_of(document)
    assert cells.keys() == prior.tensors.keys()
    for name, entry in prior.tensors.items():
        values = cells[name]["values"]
        assert values["cosine"] == pytest.approx(entry["cosine"], rel=1e-7)
        relative = entry["norm_delta"] / entry["norm_mllm"]
        assert values["relative_norm"] == pytest.approx(relative, rel=1e-7)
        assert values["equal"] == pytest.approx(entry["equal"], rel=1e-7)
        assert cells[name]["shape"] == entry["shape"]
    by_norm = sorted(prior.tensors, key=lambda n: -prior.tensors[n]["norm_delta"])
    assert [row["name"] for row in document["largest"]] == by_norm[:10]
    assert document["coverage"][:2] == [["selected", len(cells)], ["matched", len(cells)]]
    assert [f["code"] for f in document["findings"]] == [
        f["code"] for f in prior.manifest["findings"]
    ]


def test_the_histogram_of_a_prior_counts_every_stored_entry(made):
    prior = open_prior(made.prior)
    found = describe_prior(prior)["histogram"]["modules"]
    zeros = bins = 0
    with open_deltas(prior) as deltas:
        for name in prior.tensors:
            values = deltas.read(name).float()
            zeros += int((values == 0).sum())
            bins += int(((values.abs() >= 2**-8) & (values.abs() < 2**-7)).sum())
    assert sum(m["zeros"] for m in found.values()) == zeros
    assert sum(dict(map(tuple, m["bins"])).get(-8, 0) for m in found.values()) == bins > 0
    counted = sum(m["zeros"] + sum(n for _, n in m["bins"]) for m in found.values())
    assert counted == prior.manifest["num_elements"]


def test_without_its_shards_a_prior_says_why_there_is_no_histogram(made):
    document = describe_prior(open_prior(made.prior), is_whole=False)
    assert "pull" in document["histogram"]["missing"]


def test_the_page_of_a_merge_has_its_weights_and_what_it_changed(made):
    merge = open_merge(made.merged)
    comparison = compare(made.merged, made.mllm)
    document = data_of(to_html(describe_merge(merge, comparison)))
    cells = cells_of(document)
    for record in merge.tensors.values():
        if "weights" not in record:
            continue
        values = cells[record["canonical"]]["values"]
        assert values["weight"] == 0.25
        assert values["change_kept"] == pytest.approx(record["change_kept"])
    prior = open_prior(made.prior).tensors["layers.1.mlp.up_proj.weight"]
    # A quarter of the way: |merge - mllm| = |delta| / 4, up to float32.
    expected = prior["norm_delta"] / 4 / prior["norm_mllm"]
    found = cells["layers.1.mlp.up_proj.weight"]["values"]["relative_norm"]
    assert found == pytest.approx(expected, rel=1e-4)
    assert cells["visual.merger.mlp.0.weight"]["values"]["equal"] == 1.0
    whole = next(row for row in document["modules"] if row["name"] == "all of the tower")
    assert whole["count"] == len(comparison.tower)
    assert f"{whole['relative_norm']:.2%}" in document["verdict"]["sentences"][0]


def test_a_merge_whose_mllm_is_away_is_shown_from_its_manifest(made):
    document = describe_merge(open_merge(made.merged), None, "Not here.")
    assert {m["key"]: m["missing"] for m in document["maps"]} == {
        "weight": "",
        "change_kept": "",
        **dict.fromkeys(
            ("relative_norm", "cosine", "equal", "sign_agreement", "stable_rank"), "Not here."
        ),
    }
    assert to_html(document)


def test_the_page_of_a_comparison_shows_signs_with_a_base_alone(made):
    with_base = describe_comparison(compare(made.reasoner, made.mllm, made.base), ["x"])
    without = describe_comparison(compare(made.reasoner, made.mllm), ["x"])
    missing = [
        next(m["missing"] for m in document["maps"] if m["key"] == "sign_agreement")
        for document in (with_base, without)
    ]
    assert missing[0] == ""
    assert "--base" in missing[1]


def test_a_page_loads_nothing_and_is_small(made):
    html = to_html(describe_prior(open_prior(made.prior)))
    assert "default-src 'none'" in html
    markup = re.sub(r"<script.*?</script>", "", html, flags=re.DOTALL)
    assert not re.search(r"(?:src|href)=\"(?!data:)", markup)
    assert "url(" not in markup
    assert "@import" not in markup
    script = html.rpartition("<script>")[2]
    assert not re.search(r"fetch\(|XMLHttpRequest|WebSocket|import\(|new Image", script)
    assert len(html.encode()) < 200_000


def test_names_cannot_break_out_of_the_data():
    evil = "</script><script>alert(1)</script>"
    document = {"kind": "run", "title": evil, "formula": evil, "notes": [evil], "panels": []}
    document |= {"x_label": evil, "facts": [[evil, evil]], "commands": [[evil, evil]]}
    html = to_html(document)
    assert "<script>alert" not in html
    assert data_of(html) == document


def test_a_page_is_replaced_but_nothing_else_is(tmp_path, made):
    document = describe_prior(open_prior(made.prior), is_whole=False)
    page = tmp_path / "new" / "page.html"
    write_page(document, page)
    write_page(document, page)
    other = tmp_path / "thesis.html"
    other.write_text("<p>mine</p>")
    with pytest.raises(OutputError, match="no page of drift_merge"):
        write_page(document, other)
    assert other.read_text() == "<p>mine</p>"
    write_page(document, other, overwrite=True)
    assert json.dumps(data_of(other.read_text())) == json.dumps(document)
    with pytest.raises(OutputError):
        write_page(document, page / "below.html")
    with pytest.raises(CheckpointError):
        data_of("<html></html>")


@pytest.mark.parametrize("layers", [1])
def test_one_layer_is_enough(tmp_path, layers):
    made = make(tmp_path / "made", layers=layers)
    document = describe_prior(open_prior(made.prior))
    assert document["parts"][0]["layers"] == [0]
    assert document["verdict"]["layers"][0] == document["verdict"]["layers"][1]
