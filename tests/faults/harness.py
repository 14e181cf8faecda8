"""Runs of the real command line in this process, and what every refusal must look like."""

import io
import json
import sys
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import NamedTuple

import pytest

from drift_merge.cli import entry, merge, prior
from tests.checkpoints import Pair
from tests.faults.forks import Run

KINDS = {1: "different", 2: "usage", 3: "source", 4: "alignment", 5: "checkpoint", 6: "output"}
GROUPS = {"drift-prior": prior.group, "drift-merge": merge.group}


class Result(NamedTuple):
    """How a run ended."""

    code: int
    stdout: str
    stderr: str


def run(*arguments: str) -> Result:
    """Run `drift-prior ...` or `drift-merge ...` through its entry point."""
    stdout, stderr = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", list(arguments))
        with redirect_stdout(stdout), redirect_stderr(stderr), pytest.raises(SystemExit) as exit_:
            entry.run(GROUPS[arguments[0]], arguments[0])
    assert isinstance(exit_.value.code, int)
    return Result(exit_.value.code, stdout.getvalue(), stderr.getvalue())


def command(name: str, pair: Pair, out: Path) -> list[str]:
    """The command line of `align`, `compute`, `linear` on a pair, or `compress` of its prior."""
    if name == "align":
        return ["drift-prior", "align", *pair.arguments]
    if name == "compress":
        prior = str(pair.mllm.parent / "compute")
        options = ["--dtype", "int8", "-o", str(out), "--threads", "1"]
        return ["drift-prior", "compress", prior, *options]
    program = "drift-prior" if name == "compute" else "drift-merge"
    return [program, name, *pair.arguments, "-o", str(out), "--threads", "1"]


def assert_refusal(result: "Result | Run", code: int, mentions: Sequence[str]) -> None:
    """The exit code, no traceback, everything named, and a remedy, on stderr alone."""
    assert (result.code, result.stdout) == (code, ""), result
    assert result.stderr.startswith(("Error: ", "Note ", "Warning ")), result.stderr
    assert "Traceback" not in result.stderr
    assert "this is a bug" not in result.stderr
    message, _, remedy = result.stderr.partition("Error: ")[2].partition("\n\n  ")
    for mention in mentions:
        assert mention in message + remedy, result.stderr
    assert remedy.strip(), f"no remedy: {result.stderr}"


def assert_json_refusal(result: Result, code: int, mentions: Sequence[str]) -> None:
    """The same as one JSON object on stdout."""
    assert result.code == code, result
    error = json.loads(result.stdout)["error"]
    assert set(error) == {"kind", "message", "remedy"}
    assert error["kind"] == KINDS[code]
    for mention in mentions:
        assert mention in error["message"] + error["remedy"], error
    assert error["remedy"]


def refused(arguments: Sequence[str], code: int, *mentions: str) -> None:
    """Run a command, plainly and with --json; both must refuse, and leave nothing behind."""
    assert_refusal(run(*arguments), code, mentions)
    assert_json_refusal(run(*arguments, "--json"), code, mentions)
    if "-o" in arguments:
        out = Path(arguments[arguments.index("-o") + 1])
        assert not out.exists()
        assert not out.with_name(f"{out.name}.partial").exists()
