"""How many processes run the tests, where `-n` is not given."""

import os

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:
    # Before torch is imported: threads of several processes that wait for each other on few cores
    # took four times as long.
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """One per core for the default run, which is many short tests.

    Slow tests and those of engines start processes and hold models of their own: one at a time.
    """
    is_default = "not slow" in config.option.markexpr
    return min(os.cpu_count() or 1, 4) if is_default else 0
