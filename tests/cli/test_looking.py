"""compare and report: what they print, their pages, and how they refuse."""

import json
import re

import pytest

from drift_merge.reports.figures import Group
from drift_merge.reports.pages.page import data_of
from tests import checkpoints as c
from tests.hub_server.client import go_offline
from tests.reports.suite import compare, make
from tests.runs import run_linear


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make(tmp_path_factory.mktemp("looking") / "made")


def refusal(result, code, *mentions):
    """The exit code, nothing on stdout, and a remedy behind the message."""
    assert (result.code, result.out) == (code, ""), result
    message, _, remedy = result.err.partition("Error: ")[2].partition("\n\n  ")
    assert remedy.strip(), result.err
    for mention in mentions:
        assert mention in message + remedy, result.err


def files(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


class TestCompare:
    def test_a_table_of_modules_and_the_verdict(self, call, made, tmp_path):
        result = call("drift-merge", "compare", made.reasoner, made.mllm, "--base", made.base)
        assert result.code == 0, result.err
        heads, *lines = result.out.splitlines()
        assert heads.split() == [
            *("module", "tensors", "elements", "|delta|", "|delta|/|B|", "cosine", "equal"),
            "signs",
        ]
        rows = {line.split()[0]: line.split() for line in lines if line.startswith(("attn", "mlp"))}
        found = compare(made.reasoner, made.mllm, made.base)
        mlp = Group(tuple(t for t in found.tower if t.module == "mlp"))
        shown = [f"{mlp.norm_delta:.4g}", f"{mlp.relative_norm:.4g}", f"{mlp.cosine:.4f}"]
        assert rows["mlp"][1:6] == [str(len(mlp.tensors)), f"{mlp.numel:,}", *shown]
        assert re.search(r"^Tensors: \d+ compared, \d+ only b$", result.out, re.MULTILINE)
        assert "░" not in result.out  # a pipe gets no map
        assert "Note [" in result.err
        assert call("drift-merge", "compare", made.reasoner, made.mllm, "-q").err == ""

    def test_json_is_one_object_with_every_figure(self, call, made):
        result = call("drift-merge", "compare", made.merged, made.mllm, "--json")
        assert (result.code, result.err) == (0, "")
        found = compare(made.merged, made.mllm)
        assert (result.json["schema"], result.json["base"]) == (1, None)
        assert (result.json["a"], result.json["b"]) == (str(made.merged), str(made.mllm))
        assert result.json["tensors"].keys() == {t.name for t in found.tensors}
        for tensor in found.tensors:
            own = result.json["tensors"][tensor.name]
            for key in ("norm_delta", "relative_norm", "cosine", "equal", "max_abs_delta"):
                value = getattr(tensor, key)
                assert own[key] == (value if value is None else pytest.approx(value, rel=1e-7))
        assert "output" not in result.json
        assert "traffic" not in result.json

    def test_the_page_is_written_and_named_last_and_nothing_else(self, call, made, tmp_path):
        page = tmp_path / "new" / "page.html"
        before = files(made.mllm.parent)
        words = ("drift-merge", "compare", made.reasoner, made.mllm, "--modules", "attn,mlp")
        result = call(*words, "--report", page)
        assert result.code == 0, result.err
        assert result.out.splitlines()[-1] == str(page)
        document = data_of(page.read_text())
        assert document["kind"] == "comparison"
        assert {row["name"] for row in document["modules"]} == {"attn", "mlp", "all of the tower"}
        [[_, command]] = document["commands"]
        assert command.endswith(f"{made.reasoner} {made.mllm} --modules attn,mlp")
        assert call(*words, "--report", page, "--json").json["output"] == str(page)
        assert files(tmp_path) == ["new", "new/page.html"]
        assert files(made.mllm.parent) == before

    @pytest.mark.parametrize(
        ("words", "code", "mentions"),
        [
            (("{a}", "nowhere/at-all"), 3, ("nowhere/at-all",)),
            (("{a}", "{empty}"), 5, ("config.json",)),
            (("{other}", "{b}"), 4, ()),
            (("{a}", "{b}", "--modules", "atn"), 2, ("atn", "attn")),
            (("{a}", "{b}", "--layers", "99"), 2, ("99",)),
            (("{a}", "{b}", "--threads", "0"), 2, ("--threads",)),
            (("{a}", "{b}", "--map", "absent.yaml"), 2, ("absent.yaml",)),
            (("{a}", "{b}", "--report", "{thesis}"), 6, ("thesis.html", "--overwrite")),
        ],
    )
    def test_refusals(self, call, made, tmp_path, monkeypatch, words, code, mentions):
        go_offline(monkeypatch)
        shapes = {name: tuple(n + 1 for n in s) for name, s in c.text_shapes().items()}
        c.write_checkpoint(tmp_path / "other", c.random_tensors(shapes, 1), c.text_config())
        (tmp_path / "empty").mkdir()
        (tmp_path / "thesis.html").write_text("<p>mine</p>")
        names = {"a": made.reasoner, "b": made.mllm, "other": tmp_path / "other"}
        names |= {"empty": tmp_path / "empty", "thesis": tmp_path / "thesis.html"}
        words = [word.format(**names) for word in words]
        result = call("drift-merge", "compare", *words)
        refusal(result, code, *mentions)
        plain = call("drift-merge", "compare", *words, "--json")
        assert plain.code == code
        assert set(plain.json["error"]) == {"kind", "message", "remedy"}
        assert (tmp_path / "thesis.html").read_text() == "<p>mine</p>"


class TestReport:
    def test_of_a_prior(self, call, made, tmp_path):
        page = tmp_path / "prior.html"
        words = ("drift-prior", "report", made.prior, "--no-picture", "-o", page)
        result = call(*words)
        assert result.code == 0, result.err
        assert result.out == f"{page}\n"
        document = data_of(page.read_text())
        assert document["verdict"]["label"] in result.err
        assert call(*words, "-q").err == ""
        again = call(*words, "--json")
        assert again.json == {"schema": 1, "output": str(page), **document}
        assert again.err == ""

    def test_without_matplotlib_the_page_is_written_and_the_extra_named(
        self, call, made, tmp_path, monkeypatch
    ):
        monkeypatch.setattr("drift_merge.reports.pictures.has_matplotlib", lambda: False)
        result = call("drift-prior", "report", made.prior, "-o", tmp_path / "page.html")
        assert result.code == 0
        assert "pip install 'drift_merge[report]'" in result.err
        assert not (made.prior / "prior.png").exists()

    def test_of_a_training_run_with_what_it_says_of_itself(self, call, tmp_path):
        (tmp_path / "train.csv").write_text("step,loss,drift/cosine\n1,2.0,0.5\n2,1.5,0.25\n")
        told = {"kind": "drift-train", "format_version": 1, "plan": {"alpha": 0.5}, "report": None}
        (tmp_path / "train.json").write_text(json.dumps(told))
        result = call("drift-prior", "report", tmp_path, "-o", tmp_path / "run.html")
        assert result.code == 0, result.err
        document = data_of((tmp_path / "run.html").read_text())
        assert ["alpha", "0.5"] in document["facts"]
        assert document["panels"][0]["series"] == [{"name": "all", "points": [[1, 2.0], [2, 1.5]]}]

    def test_of_a_merge_beside_its_mllm(self, call, made, tmp_path):
        page = tmp_path / "merge.html"
        words = ("drift-merge", "report", made.merged, "--no-picture", "-o", page, "--json")
        found = call(*words)
        assert (found.code, found.err) == (0, "")
        whole = next(r for r in found.json["modules"] if r["name"] == "all of the tower")
        tower = Group(compare(made.merged, made.mllm).tower)
        assert whole["relative_norm"] == pytest.approx(tower.relative_norm, rel=1e-7)
        assert found.json["maps"][0]["missing"] == ""
        refusal(call(*words[:-1], "--mllm", made.base), 1, str(made.base), "--mllm SOURCE")

    def test_of_a_sweep(self, call, made, tmp_path):
        for weight in (0.5, 0.25):
            run_linear(made.reasoner, made.mllm, tmp_path / "sweep" / f"w{weight}", weight)
        page = tmp_path / "sweep.html"
        result = call("drift-merge", "report", tmp_path / "sweep", "-o", page)
        assert result.code == 0, result.err
        assert "2 merges; they differ in: weight." in result.err
        document = data_of(page.read_text())
        assert [row[:2] for row in document["table"]["rows"]] == [["w0.25", 0.25], ["w0.5", 0.5]]
        commands = dict(document["commands"])
        again = commands["Make one of them again"].split()
        assert call(*again[:-2], "-o", tmp_path / "again", "--dry-run").code == 0

    @pytest.mark.parametrize(
        ("program", "name", "code", "mentions"),
        [
            ("drift-prior", "absent", 3, ("absent",)),
            ("drift-merge", "absent", 3, ("absent",)),
            ("drift-prior", "empty", 3, ("train.csv", "handle.metrics()")),
            ("drift-merge", "empty", 3, ("drift_merge.json", "drift-merge sweep")),
            ("drift-merge", "begun.search", 3, ("has not ended",)),
            ("drift-prior", "torn-prior", 5, ("prior.json",)),
            ("drift-merge", "torn-merge", 5, ("drift_merge.json",)),
            ("drift-merge", "torn.search", 5, ("search.json",)),
        ],
    )
    def test_refusals(self, call, tmp_path, monkeypatch, program, name, code, mentions):
        monkeypatch.chdir(tmp_path)
        go_offline(monkeypatch)
        for folder, file in {
            "empty": None,
            "begun.search": "study.db",
            "torn-prior": "prior.json",
            "torn-merge": "drift_merge.json",
            "torn.search": "search.json",
        }.items():
            (tmp_path / folder).mkdir()
            if file:
                (tmp_path / folder / file).write_text("{")
        refusal(call(program, "report", name, "-o", "page.html"), code, *mentions)
        assert not (tmp_path / "page.html").exists()

    def test_a_file_that_is_no_page_is_replaced_on_demand_alone(self, call, made, tmp_path):
        page = tmp_path / "mine.html"
        page.write_text("<p>mine</p>")
        words = ("drift-prior", "report", made.prior, "--no-picture", "-o", page)
        refusal(call(*words), 6, "mine.html", "--overwrite")
        assert page.read_text() == "<p>mine</p>"
        assert call(*words, "--overwrite").code == 0
        assert data_of(page.read_text())["kind"] == "prior"
