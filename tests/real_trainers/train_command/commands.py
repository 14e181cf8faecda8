"""`drift-prior train` on the tiny LLaVA as a process of its own: run, or killed on the way."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[3]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
TRAINED = ("--steps", "8", "--lr", "0.01", "--batch-size", "2", "--accumulation", "2")
MAIN = "from drift_merge.cli.prior import main; main()"


def given(setup, out, *more, prior=True):
    """The words after `drift-prior`."""
    data = setup.mllm.parent / "data.jsonl"
    chosen = ["--prior", str(setup.prior)] if prior else ["--no-prior"]
    words = [str(setup.mllm), "--data", str(data), *chosen, "-o", str(out), "--device", "cpu"]
    return ["train", *words, *more]


def command(setup, out, *more, prior=True):
    """The command in one process."""
    return [sys.executable, "-c", MAIN, *given(setup, out, *TRAINED, *more, prior=prior)]


def run(words, code=0, **variables):
    environment = ENVIRONMENT | variables
    done = subprocess.run(
        words, capture_output=True, text=True, timeout=300, check=False, env=environment
    )
    assert done.returncode == code, done.stderr[-3000:]
    return done


def kill_at(words, marker, log):
    """Start a command, and kill it with its children as soon as a file is there."""
    with (
        log.open("w") as file,
        subprocess.Popen(
            words, env=ENVIRONMENT, stdout=file, stderr=file, start_new_session=True
        ) as process,
    ):
        deadline = time.monotonic() + 240
        while not marker.exists():
            assert process.poll() is None, log.read_text()[-3000:]
            assert time.monotonic() < deadline
            time.sleep(0.005)
        process.send_signal(signal.SIGSTOP)  # a launcher must not end its children in peace
        for child in _children_of(process.pid):  # torchrun gives each a session of its own
            os.kill(child, signal.SIGKILL)
        process.kill()


def _children_of(process):
    words = ["ps", "-o", "pid=", "--ppid", str(process)]
    found = subprocess.run(words, capture_output=True, text=True, check=False).stdout.split()
    return [int(one) for one in found]
