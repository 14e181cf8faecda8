"""The fixture `call`: the two programs in this process, as their entry points start them."""

import contextlib
import importlib
import io
import json
import sys
from typing import Any, NamedTuple

import pytest

from drift_merge.cli import entry


class Called(NamedTuple):
    """What a program left: its exit code and both streams."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """stdout as one JSON value."""
        return json.loads(self.out)


@pytest.fixture
def call(monkeypatch):
    """`call("drift-prior", "align", ...)`: run a program to its exit."""
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.delenv("DRIFT_MERGE_DEBUG", raising=False)

    def run(program: str, *arguments: object) -> Called:
        group = importlib.import_module(f"drift_merge.cli.{program.removeprefix('drift-')}").group
        monkeypatch.setattr(sys, "argv", [program, *map(str, arguments)])
        out, err = io.StringIO(), io.StringIO()
        with (
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
            pytest.raises(SystemExit) as ended,
        ):
            entry.run(group, program)
        return Called(int(ended.value.code or 0), out.getvalue(), err.getvalue())

    return run
