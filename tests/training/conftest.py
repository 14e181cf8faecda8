"""The toys, made once. Their gradients are small, and what is strong beside them is meant."""

from pathlib import Path

import pytest

from tests.training.toys import Toy, make_toy


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Many a test moves the weights by the prior alone: `test_strength` looks at the warning."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.filterwarnings("ignore:the bias is .* times the gradient"))


@pytest.fixture(scope="session")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Toy:
    """A pair in float32 and its prior of attn, mlp and norm."""
    return make_toy(tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="session")
def other_toy(tmp_path_factory: pytest.TempPathFactory) -> Toy:
    """Another pair of the same shapes."""
    return make_toy(tmp_path_factory.mktemp("other"), seed=5)
