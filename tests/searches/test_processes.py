"""Searches that are killed, and several that share a study: as commands, in processes."""

import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

import drift_merge
from tests import checkpoints as c

pytest.importorskip("optuna")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

EVALUATE = """
import json, os, sys, time
model, seconds = sys.argv[1], float(sys.argv[2])
file = os.path.join(model, "drift_merge.json")
weight = (json.load(open(file))["parameters"]["weights"] or [0.1])[0] if os.path.exists(file) else 0
print(os.getpid(), model, weight, file=open(sys.argv[3], "a"))
time.sleep(seconds)
if 0.2 < weight < 0.24:
    sys.exit("deliberate")
print(1 - (weight - 0.3) ** 2)
"""


@pytest.fixture
def begin(tmp_path):
    """Start the command in `tmp_path`, with an evaluation that takes so many seconds."""
    c.make_pair(tmp_path)
    (tmp_path / "recipe.yaml").write_text("method: linear\nreasoner: reasoner\nmllm: mllm\n")
    (tmp_path / "evaluate.py").write_text(EVALUATE)
    (tmp_path / "scratch").mkdir()
    evaluate = shlex.join([sys.executable, "-S", "evaluate.py", "{model}"])
    started = []

    def start(trials, seconds, *more, cwd=tmp_path):
        words = [
            *(sys.executable, "-m", "drift_merge", "search", "recipe.yaml", "-o", "best", "--json"),
            *("--space", "weight=0:0.4", "--sampler", "random", "--scratch", "scratch"),
            *("--evaluate", f"{evaluate} {seconds} {tmp_path / 'log'}"),
            *("--trials", str(trials), "--threads", "1", *more),
        ]
        process = subprocess.Popen(
            words, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()


def lines(tmp_path):
    log = tmp_path / "log"
    return log.read_text().splitlines() if log.exists() else []


def wait_for(condition, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)


def answer(process):
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, out + err
    return json.loads(out)


def test_a_search_that_is_killed_at_any_moment_goes_on(begin, tmp_path):
    """Killed while the mllm, the default or a trial is evaluated: three times, then to the end."""
    for count in (1, 3, 5):
        process = begin(6, 1.0)
        before = len(lines(tmp_path))
        wait_for(lambda before=before, count=count: len(lines(tmp_path)) >= before + count)
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        evaluating = int(lines(tmp_path)[-1].split()[0])
        wait_for(lambda evaluating=evaluating: not os.path.exists(f"/proc/{evaluating}"))
    found = answer(begin(6, 1.0))
    assert [t["state"] in ("complete", "failed") for t in found["trials"]] == [True] * 6
    assert found["num_interrupted"] >= 1
    assert not list((tmp_path / "scratch").iterdir())  # nothing of the killed ones either
    drift_merge.verify_merge(drift_merge.open_merge(tmp_path / "best"))
    weights = [t["parameters"]["weight"] for t in found["trials"]]
    assert len(set(weights)) == 6  # what was cut short was tried once again, not skipped
    # The mllm and the default were measured to their end once: later runs did not repeat them.
    of_mllm = [line for line in lines(tmp_path) if line.split()[1] == str(tmp_path / "mllm")]
    assert len(of_mllm) == 2  # the first was killed


def test_three_processes_share_one_study(begin, tmp_path):
    processes = [begin(9, 1.0) for _ in range(3)]
    first, *others = [answer(process) for process in processes]
    assert all(other == first for other in others)
    assert [t["number"] for t in first["trials"]] == list(range(9))
    weights = [t["parameters"]["weight"] for t in first["trials"]]
    assert len(set(weights)) == 9  # nobody repeats another's
    logged = [line.split() for line in lines(tmp_path)]
    trials = [model for _, model, _ in logged if "trial-" in model]
    assert len(trials) == 9  # each trial was evaluated once, by one of them
    places = {model.rpartition("/")[0] for model in trials}
    assert len(places) == 3  # and each process has done some
    assert len([model for _, model, _ in logged if model == str(tmp_path / "mllm")]) == 1
    failed = [t for t in first["trials"] if t["state"] == "failed"]
    assert all("deliberate" in t["error"]["message"] for t in failed)
    drift_merge.verify_merge(drift_merge.open_merge(tmp_path / "best"))


@pytest.fixture
def database(tmp_path):
    """The URL of a PostgreSQL server of our own on loopback."""
    psycopg = pytest.importorskip("psycopg")
    binaries = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    found = shutil.which("initdb") or (str(binaries[-1]) if binaries else None)
    if found is None:
        pytest.skip("no PostgreSQL server")
    # It refuses to run as root: in a user namespace root may be another.
    another = ["unshare", "--user", "--map-user=1000", "--map-group=1000"]
    prefix = another if os.geteuid() == 0 else []
    data = str(tmp_path / "postgres")
    made = [*prefix, found, "-D", data, "-A", "trust", "-U", "drift", "--no-sync"]
    if subprocess.run(made, capture_output=True, check=False).returncode != 0:
        pytest.skip("no PostgreSQL server can be made here")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = [
        f"port={port}",
        "listen_addresses=127.0.0.1",
        "unix_socket_directories=",
        "fsync=off",
    ]
    server = subprocess.Popen(
        [*prefix, str(Path(found).with_name("postgres")), "-D", data]
        + [word for option in options for word in ("-c", option)],
        stderr=subprocess.DEVNULL,
    )
    url = f"postgresql://drift@127.0.0.1:{port}/postgres"

    def is_up():
        try:
            psycopg.connect(url).close()
        except psycopg.OperationalError:
            return False
        return True

    wait_for(is_up)
    yield url
    server.send_signal(signal.SIGINT)
    server.wait(60)


def test_machines_share_the_study_of_a_server(begin, tmp_path, database):
    """Three processes with nothing in common but the database; one is killed and comes back."""
    machines = [tmp_path / f"machine{number}" for number in range(3)]
    for machine in machines:
        machine.mkdir()
        for name in ("reasoner", "mllm", "scratch"):
            shutil.copytree(tmp_path / name, machine / name)
        for name in ("recipe.yaml", "evaluate.py"):
            shutil.copy(tmp_path / name, machine)
    more = ("--storage", database, "--study", "shared")
    processes = [begin(9, 1.0, *more, cwd=machine) for machine in machines]

    def trials_of(machine):
        return [line for line in lines(tmp_path) if f"{machine}/scratch" in line]

    wait_for(lambda: trials_of(machines[2]))
    processes[2].kill()
    processes[2].communicate()
    processes[2] = begin(9, 1.0, *more, cwd=machines[2])
    first, *others = [answer(process) for process in processes]
    assert [t["state"] in ("complete", "failed") for t in first["trials"]] == [True] * 9
    assert all(other["trials"] == first["trials"] for other in others)
    assert len({t["parameters"]["weight"] for t in first["trials"]}) == 9
    assert all(trials_of(machine) for machine in machines)
    bests = {(machine / "best" / "model.safetensors").read_bytes() for machine in machines}
    assert len(bests) == 1
    assert not [left for machine in machines for left in (machine / "scratch").iterdir()]
    drift_merge.verify_merge(drift_merge.open_merge(machines[0] / "best"))
