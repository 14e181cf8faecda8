"""The guide that says how to add a method to the table, followed in a copy of the package."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from drift_merge import guides
from tests import checkpoints as c

PACKAGE = Path(__file__).parents[3] / "drift_merge"
METHODS = Path("drift_merge") / "maths" / "methods"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """`run("drift-merge", ...)` with the package to which the guide's method was added."""
    folder = tmp_path_factory.mktemp("added")
    shutil.copytree(PACKAGE, folder / "drift_merge")
    text = guides.text_of("adding-a-method")
    [function] = re.findall(r"^```text\n(def .*?)^```$", text, re.DOTALL | re.MULTILINE)
    [row] = re.findall(r"^```text\n(    Method\(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    with (folder / METHODS / "elementwise.py").open("a") as file:
        file.write(f"\n\n{function}")
    entries = folder / METHODS / "entries.py"
    rows = entries.read_text()
    first = rows.index("    Method(\n")
    entries.write_text(rows[:first] + row + rows[first:])

    def call(*words):
        script = f"from drift_merge.cli.{words[0][6:]} import main; main()"
        done = subprocess.run(
            [sys.executable, "-c", script, *map(str, words[1:])],
            env={"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"},
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return call


def test_command_and_help_follow_from_the_row(run):
    assert "Go half the way to the reasoner." in run("drift-merge", "--help")
    page = run("drift-merge", "halfway", "--help")
    assert "--scale X" in page
    assert "--density" not in page
    listed = json.loads(run("drift-merge", "methods", "--json"))["methods"]
    assert [m["paper"] for m in listed if m["name"] == "halfway"] == ["none: an example"]


def test_the_merge_is_the_formula(run, tmp_path):
    pair = c.make_pair(tmp_path, dtype="F32")
    how = ("--scale", "0.5", "--threads", "1", "-q", "-o", tmp_path / "out")
    run("drift-merge", "halfway", *pair.arguments, *how)
    reasoner, mllm = c.read_tensors(pair.reasoner), c.read_tensors(pair.mllm)
    merged = c.read_tensors(tmp_path / "out")
    name = "model.layers.0.mlp.up_proj.weight"
    start, aim, found = (tensors[name].values for tensors in (mllm, reasoner, merged))
    assert np.abs(found - (start + 0.25 * (aim - start))).max() < 1e-6
    assert np.abs(found - start).max() > 1e-3
