"""How many processes run the tests, where `-n` is not given."""

import os

import pytest


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """One per core for the default run, which is many short tests.

    Slow tests and those of engines start processes and hold models of their own: one at a time.
    """
    is_default = "not slow" in config.option.markexpr
    return min(os.cpu_count() or 1, 4) if is_default else 0
