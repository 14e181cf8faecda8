"""Workers as processes: the same files, and no failure of one goes unheard."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from drift_merge.engine import steps, workers
from drift_merge.errors import DriftMergeError, OutputError
from drift_merge.storage import shards
from tests import checkpoints as c
from tests.runs import run_linear, run_prior

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes are for Linux")


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return c.make_pair(tmp_path_factory.mktemp("pair"), num_shards=(2, 3))


@pytest.fixture(autouse=True)
def _processes(monkeypatch):
    monkeypatch.setattr(workers, "PROCESS_BYTES", 0)


def children():
    """The processes started by this one that nobody has waited for; other tests may have some."""
    lists = Path("/proc/self/task").glob("*/children")
    return {number for path in lists for number in path.read_text().split()}


def in_a_child(monkeypatch, act):
    """Have the third bundle of every child meet `act`; the parent works on none."""
    real, parent, count = workers.run_bundle, os.getpid(), [0]

    def run_bundle(run, bundle):
        assert os.getpid() != parent
        count[0] += 1
        if count[0] == 3:
            act(run)
        return real(run, bundle)

    monkeypatch.setattr(workers, "run_bundle", run_bundle)


@pytest.mark.parametrize("count", [2, 3, 50])
def test_any_number_of_processes_gives_the_files_of_one_thread(pair, tmp_path, monkeypatch, count):
    in_a_child(monkeypatch, lambda run: None)
    for kind in (run_prior, run_linear):
        out = tmp_path / kind.__name__
        kind(*pair, out, threads=count)
        many = c.read_files(out)
        monkeypatch.setattr(workers, "PROCESS_BYTES", 2**62)
        monkeypatch.setattr(workers, "run_bundle", steps.run_bundle)
        kind(*pair, out, threads=1, overwrite=True)
        assert c.read_files(out) == many
        monkeypatch.setattr(workers, "PROCESS_BYTES", 0)


def test_an_error_of_a_child_is_raised_as_it_is_and_leaves_no_output(pair, tmp_path, monkeypatch):
    def fail(run):
        raise OutputError("the disk broke", remedy="buy one")

    in_a_child(monkeypatch, fail)
    before = children()
    with pytest.raises(OutputError) as caught:
        run_linear(*pair, tmp_path / "out", threads=2)
    assert (caught.value.message, caught.value.remedy) == ("the disk broke", "buy one")
    assert not (tmp_path / "out").exists()
    assert children() <= before


def test_a_bug_in_a_child_arrives_with_its_traceback(pair, tmp_path, monkeypatch):
    def fail(run):
        raise ZeroDivisionError("a bug")

    in_a_child(monkeypatch, fail)
    with pytest.raises(ZeroDivisionError, match="a bug") as caught:
        run_linear(*pair, tmp_path / "out", threads=2)
    assert "in run_bundle" in str(caught.value.__cause__)


def test_a_child_that_is_killed_is_reported_and_the_next_run_resumes(pair, tmp_path, monkeypatch):
    run_linear(*pair, tmp_path / "whole", 0.3)
    with monkeypatch.context() as patch:
        in_a_child(patch, lambda run: os.kill(os.getpid(), signal.SIGKILL))
        with pytest.raises(DriftMergeError, match="by signal 9"):
            run_linear(*pair, tmp_path / "out", 0.3, threads=2)
    assert not (tmp_path / "out").exists()
    run_linear(*pair, tmp_path / "out", 0.3, threads=2)
    assert c.read_files(tmp_path / "out") == c.read_files(tmp_path / "whole")


def test_an_interrupt_keeps_what_is_finished_and_ends_the_children(pair, tmp_path, monkeypatch):
    def interrupt(run):
        os.kill(os.getppid(), signal.SIGINT)
        while not run.stop.is_set():
            time.sleep(0.001)

    in_a_child(monkeypatch, interrupt)
    before = children()
    with pytest.raises(KeyboardInterrupt):
        run_linear(*pair, tmp_path / "out", 0.3, threads=2)
    journal = (tmp_path / "out.partial" / "journal.jsonl").read_text()
    assert journal.count("\n") > 1
    assert children() <= before


KILLED = """
import os, sys, time
from pathlib import Path
from drift_merge.engine import workers
workers.PROCESS_BYTES = 0
def run_bundle(run, bundle):
    Path(sys.argv[4], str(os.getpid())).touch()
    time.sleep(60)
workers.run_bundle = run_bundle
from tests.runs import run_linear
run_linear(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), threads=2)
"""


def is_running(process):
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_children_end_with_a_parent_that_is_killed(pair, tmp_path):
    seen = tmp_path / "seen"
    seen.mkdir()
    arguments = [str(p) for p in (*pair, tmp_path / "out", seen)]
    parent = subprocess.Popen(
        [sys.executable, "-c", KILLED, *arguments], cwd=Path(__file__).parents[2]
    )
    deadline = time.monotonic() + 60
    while len(list(seen.iterdir())) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    children = [int(path.name) for path in seen.iterdir()]
    assert len(children) == 2
    parent.kill()
    parent.wait()
    while any(map(is_running, children)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(map(is_running, children))


def test_progress_of_children_adds_up_to_what_is_written(pair, tmp_path):
    from drift_merge.engine.job import RunOptions
    from drift_merge.plans.prepare import prepare
    from drift_merge.priors.compute import compute_prior
    from drift_merge.recipes.recipe import Recipe

    recipe = Recipe(method="prior", reasoners=(str(pair[0]),), mllm=str(pair[1]), dtype="bfloat16")
    prepared, seen = prepare(recipe, quiet=True), []
    plan = prepared.plan()
    options = RunOptions(threads=2, progress=seen.append)
    compute_prior(prepared, plan, tmp_path / "out", options)
    assert sum(seen) == plan.write_bytes


def test_a_large_tensor_is_begun_first(pair, tmp_path, monkeypatch):
    begun = []
    real = shards.ShardWriter.write

    def write(self, info, begin, data):
        begun.append(info.size_bytes)
        real(self, info, begin, data)

    monkeypatch.setattr(shards.ShardWriter, "write", write)
    monkeypatch.setattr(workers, "PROCESS_BYTES", 2**62)
    run_linear(*pair, tmp_path / "out", 0.3)
    assert begun[0] == max(begun)
    assert torch.get_num_threads() >= 1
