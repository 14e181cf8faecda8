"""Run the commands where torch cannot be imported, as on a machine that only looks."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

BLOCKED = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "numpy", "transformers"):
            raise AssertionError(f"{name} was imported")
sys.meta_path.insert(0, Blocker())
from importlib import import_module
import io, json
from contextlib import redirect_stderr, redirect_stdout
from drift_merge.cli.entry import run
failures = []
for expected, program, *arguments in json.loads(sys.stdin.read()):
    out, err = io.StringIO(), io.StringIO()
    sys.argv = [program, *arguments]
    group = import_module(f"drift_merge.cli.{program.removeprefix('drift-')}").group
    try:
        with redirect_stdout(out), redirect_stderr(err):
            run(group, program)
    except SystemExit as error:
        if (error.code or 0) != expected:
            failures.append([program, arguments, error.code, out.getvalue() + err.getvalue()])
assert not failures, failures
"""


def run_without_torch(calls: Sequence[Sequence[object]], folder: Path) -> None:
    """Run `[exit code, program, *arguments]` of each call in one process; each must end so."""
    done = subprocess.run(
        [sys.executable, "-c", BLOCKED],
        input=json.dumps(calls),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])},
    )
    assert done.returncode == 0, done.stderr[-3000:]
