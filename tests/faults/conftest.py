from collections.abc import Iterator

import pytest

from tests.faults.forks import Forks


@pytest.fixture(scope="session")
def forks() -> Iterator[Forks]:
    """A server that runs commands in processes that may die."""
    server = Forks()
    yield server
    server.close()
