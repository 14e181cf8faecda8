"""What every test shares: hypothesis's profile, Ctrl-C, how many processes run the tests."""

import atexit
import os
import signal
import tempfile

import hypothesis
import pytest
from hypothesis.configuration import set_hypothesis_home_dir

pytest_plugins = ("tests.programs",)  # the fixture `call`

if "PYTEST_XDIST_WORKER" in os.environ:
    # Before torch is imported: threads of several processes that wait for each other on few cores
    # took four times as long.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# A shell ignores SIGINT for what it starts in the background, and children inherit that; tests
# that interrupt a run, here or in a process of its own, need what a terminal gives.
signal.signal(signal.SIGINT, signal.default_int_handler)

# The same examples in every run. No deadline: the first example pays for imports and warm-up.
hypothesis.settings.register_profile("shared", deadline=None, database=None, derandomize=True)
hypothesis.settings.load_profile("shared")

# Hypothesis keeps tables of the tested modules' constants, without a database too. It writes while
# tests are collected, before a fixture could send it elsewhere; the folder goes with the process.
_tables = tempfile.TemporaryDirectory(prefix="hypothesis-", ignore_cleanup_errors=True)
atexit.register(_tables.cleanup)
set_hypothesis_home_dir(_tables.name)


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """One per core for the default run, which is many short tests.

    Slow tests and those of engines start processes and hold models of their own: one at a time.
    """
    is_default = "not slow" in config.option.markexpr
    return min(os.cpu_count() or 1, 4) if is_default else 0
