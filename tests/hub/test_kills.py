"""A push killed with -9 at random moments, and taken up again by the same command."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.checkpoints import read_files
from tests.hub.places import REPO, TOKEN, files_at, shards_of
from tests.hub_server.client import environment
from tests.hub_server.server import HubServer
from tests.hub_server.store import Account

ROOT = Path(__file__).parents[2]
SEED = 20_251_122


def command(prior: Path, repo_id: str, *options: str) -> list[str]:
    start = "from drift_merge.cli.prior import main; main()"
    return [sys.executable, "-c", start, "push", str(prior), repo_id, "-q", *options]


def variables(hub: HubServer, home: Path) -> dict[str, str]:
    return {**os.environ, **environment(hub, home), "HF_TOKEN": TOKEN, "PYTHONPATH": str(ROOT)}


def hashes(hub: HubServer, repo_id: str) -> dict[str, tuple[object, ...]]:
    """What the Hub's API says of every file."""
    from tests.hub_server.repo import tree

    repo = hub.repos[repo_id]
    listed = tree(repo.commits[repo.refs["main"]])
    return {str(e["path"]): (e["size"], e["oid"], str(e.get("lfs"))) for e in listed}


@pytest.fixture
def slow_hub(tmp_path: Path):
    """A Hub whose uploads take some time, so that a kill falls into them too."""
    with HubServer(tmp_path / "store") as hub:
        hub.accounts[TOKEN] = Account("alice", orgs=("org",))
        hub.inject("PUT /upload/", bytes_per_second=3_000_000)
        hub.inject("POST /api/models/.*/commit/", delay_seconds=0.05)
        yield hub


def killed_and_resumed(hub: HubServer, prior: Path, home: Path, moments: int) -> list[str]:
    """Kill pushes at random moments after they begin to write; finish each.

    A moment is a number of requests, and a few milliseconds into the answer of the last. Returns
    how far each had come.
    """
    environ = variables(hub, home)
    subprocess.run(command(prior, "org/whole"), env=environ, check=True, capture_output=True)
    whole = hashes(hub, "org/whole")
    requests = hub.requests()
    first = next(i for i, x in enumerate(requests, start=1) if x.path == "/api/repos/create")
    chance = random.Random(SEED)
    stages = []
    for number in range(moments):
        repo_id = f"org/killed{number}"
        hub.store.lfs.clear()  # each repository begins without what the others have sent
        moment = hub.num_begun + chance.randint(first, len(requests))
        process = subprocess.Popen(
            command(prior, repo_id), env=environ, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        while process.poll() is None and hub.num_begun < moment:
            time.sleep(0.001)
        time.sleep(chance.uniform(0, 0.05))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        stages.append(stage_of(hub, repo_id, whole, process.returncode))
        done = subprocess.run(command(prior, repo_id), env=environ, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert hashes(hub, repo_id) == with_name(hub, repo_id, whole), stages
    return stages


def stage_of(hub: HubServer, repo_id: str, whole: dict[str, object], code: int) -> str:
    """How far a killed push had come; an unfinished one has no card."""
    if code == 0:
        return "finished"
    if repo_id not in hub.repos:
        return "nothing"
    names = files_at(hub, repo_id).keys()
    assert "README.md" not in names or names == whole.keys()
    assert "prior.json" not in names or {n for n in whole if n.endswith(".safetensors")} <= names
    if "README.md" in names:
        return "all but the answer"
    return f"{len(names) - 1} files"


def with_name(hub: HubServer, repo_id: str, whole: dict[str, object]) -> dict[str, object]:
    """The hashes of an undisturbed push; its card says the name of its own repository."""
    card = hashes(hub, repo_id)["README.md"]
    ours, theirs = (files_at(hub, name)["README.md"].decode() for name in (repo_id, "org/whole"))
    assert ours.replace(repo_id, "org/whole") == theirs
    return whole | {"README.md": card}


def test_a_push_killed_at_random_moments_is_completed_by_the_same_command(
    slow_hub: HubServer, built, tmp_path: Path
) -> None:
    stages = killed_and_resumed(slow_hub, built.prior, tmp_path / "home", moments=2)
    assert len(stages) == 2


@pytest.mark.slow
def test_a_push_killed_at_twenty_random_moments_is_completed_by_the_same_command(
    slow_hub: HubServer, built, tmp_path: Path
) -> None:
    stages = killed_and_resumed(slow_hub, built.prior, tmp_path / "home", moments=20)
    print(stages)
    assert sum(stage.endswith("files") for stage in stages) >= 10, stages
    assert len(set(stages)) >= 4, stages


@pytest.mark.slow
def test_a_pull_killed_at_random_moments_is_completed_by_the_same_command(
    slow_hub: HubServer, built, tmp_path: Path
) -> None:
    environ = variables(slow_hub, tmp_path / "home")
    subprocess.run(command(built.prior, REPO), env=environ, check=True, capture_output=True)
    slow_hub.inject("GET /lfs/", delay_seconds=0.05)
    start = [sys.executable, "-c", "from drift_merge.cli.prior import main; main()", "pull", REPO]
    begun = slow_hub.num_begun
    subprocess.run([*start, "-o", str(tmp_path / "whole")], env=environ, check=True)
    num_requests = slow_hub.num_begun - begun
    expected = {n: data for n, data in files_at(slow_hub).items() if n != ".gitattributes"}
    chance = random.Random(SEED)
    found = []
    for number in range(8):
        out = tmp_path / f"out{number}"
        moment = slow_hub.num_begun + chance.randint(1, num_requests)
        process = subprocess.Popen([*start, "-o", str(out), "-q"], env=environ)
        while process.poll() is None and slow_hub.num_begun < moment:
            time.sleep(0.001)
        time.sleep(chance.uniform(0, 0.05))
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not out.exists() or read_files(out) == expected
        found.append(len(list(tmp_path.glob(f"out{number}.partial/payload/*.safetensors"))))
        if not out.exists():
            subprocess.run([*start, "-o", str(out), "-q"], env=environ, check=True)
        assert read_files(out) == expected
        assert not out.with_name(f"{out.name}.partial").exists()
    assert len(set(found)) > 2, found


def test_ctrl_c_says_that_the_same_command_completes_it(
    slow_hub: HubServer, built, tmp_path: Path
) -> None:
    slow_hub.inject("PUT /upload/", delay_seconds=0.2)
    environ = variables(slow_hub, tmp_path / "home")
    process = subprocess.Popen(
        command(built.prior, REPO), env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    while process.poll() is None and not slow_hub.requests("PUT /upload/"):
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate()
    assert process.returncode == 130, err
    assert out == b""
    assert b"org/prior is incomplete, without its card" in err
    assert b"Traceback" not in err
    assert len(shards_of(built.prior)) > 8
    done = subprocess.run(command(built.prior, REPO), env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "README.md" in files_at(slow_hub)
