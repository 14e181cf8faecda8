"""The toy's prior, made once, and runs that several tests look at."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.real_engines import toy
from tests.real_engines.launch import launch

Run = Callable[..., list[dict[str, Any]]]


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Reasoner, mllm and prior of the toy."""
    return toy.make_prior(tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="session")
def run_once(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """`launch`, but the same call is answered from what it returned before."""
    known: dict[str, list[dict[str, Any]]] = {}

    def run(scenario: str, **settings: Any) -> list[dict[str, Any]]:
        key = repr((scenario, sorted(settings.items())))
        if key not in known:
            directory = tmp_path_factory.mktemp(scenario) / "run"
            known[key] = launch(scenario, directory, **{"source": str(source)} | settings)
        return known[key]

    return run
