"""`drift-prior demo`: the whole path, offline, and what it leaves can be trusted."""

import contextlib
import io
import time

import pytest

from drift_merge.cli.commands.demo import demo_action, make_pair
from tests import checkpoints as c


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    """The demo's directory, what it printed, and how long it took."""
    directory = tmp_path_factory.mktemp("demo") / "demo"
    started, out = time.monotonic(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()):
        demo_action(directory, quiet=False)
    return directory, out.getvalue(), time.monotonic() - started


@pytest.fixture(scope="module")
def directory(shown):
    return shown[0]


def test_the_demo_leaves_a_prior_and_a_merge_that_verify_against_their_sources(call, shown):
    directory, out, seconds = shown
    assert seconds < 60
    for step in ("1. ", "2. ", "3. ", "4. ", "5. "):
        assert f"\n{step}" in out
    assert str(directory) in out
    assert "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B" in out
    given = ("--reasoner", directory / "reasoner", "--mllm", directory / "mllm", "--sample", 500)
    for program, name in (("drift-prior", "prior"), ("drift-merge", "merged")):
        checked = call(program, "verify", directory / name, *given, "--json")
        assert checked.code == 0
        assert len(checked.json["recomputed"]) == checked.json["tensors"]


def test_the_commands_that_the_demo_shows_do_what_it_did(call, directory, tmp_path):
    sources = (directory / "reasoner", directory / "mllm")
    assert call("drift-prior", "align", *sources).code == 0
    call("drift-prior", "compute", *sources, "-o", tmp_path / "prior", "-q")
    call("drift-merge", "linear", *sources, "-o", tmp_path / "merged", "-q")
    for name in ("prior", "merged"):
        assert c.read_files(tmp_path / name) == c.read_files(directory / name)


def test_the_demo_is_the_same_every_time(directory, tmp_path):
    for path in make_pair(tmp_path):
        assert c.read_files(path) == c.read_files(directory / path.name)


def test_the_demo_refuses_a_directory_that_exists(call, tmp_path):
    result = call("drift-prior", "demo", "-o", tmp_path)
    assert result.code == 6
    assert list(tmp_path.iterdir()) == []


def test_the_quiet_demo_prints_paths_and_verdicts_only(call, tmp_path):
    result = call("drift-prior", "demo", "-q", "-o", tmp_path / "demo")
    assert (result.code, result.err) == (0, "")
    assert "$" not in result.out
    assert len(result.out.splitlines()) <= 6
