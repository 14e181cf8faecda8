"""`drift-merge search` and the example of its guide."""

import json
import re
import shlex
import sys

import pytest

from drift_merge.errors import RecipeError
from tests.searches.small import search

pytest.importorskip("optuna")


@pytest.mark.slow
def test_the_example_of_the_guide_runs(tmp_path, monkeypatch):
    from drift_merge import guides
    from drift_merge.cli.commands.demo import make_pair

    make_pair(tmp_path / "demo")
    monkeypatch.chdir(tmp_path)
    code = guides.text_of("search").split("```py\n")[1].split("```")[0]
    exec(compile(code, "the guide", "exec"), {})
    assert (tmp_path / "best-py" / "model.safetensors").is_file()


@pytest.fixture
def command(call, pair, tmp_path, monkeypatch):
    """The command, in a folder with a recipe and a program that evaluates."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").write_text(
        f"method: linear\nreasoner: {pair.reasoner}\nmllm: {pair.mllm}\n"
    )
    (tmp_path / "evaluate.py").write_text(
        "import json, os, sys\n"
        "file = os.path.join(sys.argv[1], 'drift_merge.json')\n"
        "weight = 0.0\n"
        "if os.path.exists(file):\n"
        "    weight = (json.load(open(file))['parameters']['weights'] or [0.1])[0]\n"
        "right = [float(i < 100 * weight) for i in range(100)]\n"
        "json.dump(right, open(os.path.join(sys.argv[2], 'right.json'), 'w'))\n"
        "print('accuracy', sum(right) / 100)\n"
    )
    program = f"{sys.executable} -S evaluate.py {{model}} {{out}}"

    def run(*words):
        return call(
            *("drift-merge", "search", "recipe.yaml", "--evaluate", program, "-o", "best"),
            *("--items", "right.json:*", "--threads", "1", *words),
        )

    return run


def test_the_command_shows_its_plan_its_table_one_object_and_its_page(command, call, tmp_path):
    result = command("--space", "weight=0.1,0.4", "--dry-run")
    assert result.code == 0, result.err
    assert "weight of linear" in result.out
    assert not (tmp_path / "best.search").exists()
    result = command("--space", "weight=0.1,0.4", "--trials", "2")
    assert result.code == 0, result.err
    assert re.search(r"best \(trial \d\) +validation +0\.4 +mllm .* better", result.out)
    assert "Note [validation]" in result.err
    again = command("--space", "weight=0.1,0.4", "--trials", "2", "--json")
    assert again.json["validation"]["best"]["values"] == {"score": 0.4}
    assert json.loads((tmp_path / "best.search" / "search.json").read_text()) == again.json
    report = ("drift-merge", "report", "best.search", "-o", "page.html")
    page = call(*report, "--json").json
    assert [t["values"] for t in page["trials"]] == [t["values"] for t in again.json["trials"]]
    assert page["verdict"]["sentences"][0] in call(*report).err
    commands = dict(page["commands"])
    (tmp_path / "recipe.yaml").write_text(commands["The recipe"].split("\n", 1)[1][: -len("END")])
    for label in ("Search again, where the program is", "Make the best again"):
        assert call(*shlex.split(commands[label]), "--dry-run").code == 0, label
    refused = call(*report, "--stable-rank")
    assert refused.code == 2
    assert "drift-merge report best --stable-rank" in refused.err


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ((), "--space"),
        (("--space", "density=0:1"), "no option density"),
        (("--space", "weight=0:1", "--final", "prog"), "{model}"),
        (("--space", "weight=0:1", "--metric", "a.json"), "FILE:path"),
        (("--space", "weight=0:1", "--minimize", "loss"), "no such metric"),
        (("--space", "weight=0:1", "--sampler", "tpee"), "tpee"),
    ],
)
def test_usage_errors_of_the_command(command, words, named, tmp_path):
    result = command(*words)
    assert result.code == 2
    assert named in result.err
    assert not (tmp_path / "best.search").exists()


def test_without_optuna_the_extra_is_named(pair, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(RecipeError, match=r"drift_merge\[search\]"):
        search(pair, pytest.fail)
