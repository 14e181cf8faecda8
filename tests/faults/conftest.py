from collections.abc import Iterator

import pytest

from tests.checkpoints import Pair, make_pair
from tests.faults.forks import Forks


@pytest.fixture(scope="session")
def forks() -> Iterator[Forks]:
    """A server that runs commands in processes that may die, with a hash seed that is known."""
    server = Forks({"PYTHONHASHSEED": "1"})
    yield server
    server.close()


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """A sound pair of two shards each; tests damage copies of it."""
    return make_pair(tmp_path_factory.mktemp("whole"), layers=1, num_shards=2)
