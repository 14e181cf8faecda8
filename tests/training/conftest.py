"""The toys, made once."""

import pytest

from tests.training.toys import Toy, make_toy


@pytest.fixture(scope="session")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Toy:
    """A pair in float32 and its prior of attn, mlp and norm."""
    return make_toy(tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="session")
def other_toy(tmp_path_factory: pytest.TempPathFactory) -> Toy:
    """Another pair of the same shapes."""
    return make_toy(tmp_path_factory.mktemp("other"), seed=5)
