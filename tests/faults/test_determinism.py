"""The same bytes for any thread count, hash seed and sharding of the inputs."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.checkpoints import SIDECARS, make_pair, read_files, store
from tests.faults.forks import Forks

BIG = "model.layers.0.mlp.extra_proj.weight"  # several chunks of the stream
COMMANDS = {
    "compute": ("drift-prior", "compute"),
    "int8": ("drift-prior", "compute", "--dtype", "int8"),
    "linear": ("drift-merge", "linear", "--weight", "0.3"),
}
SHARDINGS = {"whole": 1, "few": (1, 3), "many": (4, 7)}


@pytest.fixture(scope="module")
def seeded(request: pytest.FixtureRequest) -> Iterator[tuple[str, Forks]]:
    server = Forks({"PYTHONHASHSEED": request.param})
    yield request.param, server
    server.close()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders that hold the same pair under the same names, in other shards."""
    values = np.random.default_rng(0).normal(0, 0.02, (2, 600, 500))
    found = {}
    for name, shards in SHARDINGS.items():
        found[name] = tmp_path_factory.mktemp(name)
        make_pair(
            found[name],
            num_shards=shards,
            reasoner={BIG: store(values[0])},
            mllm={BIG: store(values[1])},
            mllm_sidecars=SIDECARS,
        )
    return found


@pytest.fixture(scope="module")
def first() -> dict[str, dict[str, bytes]]:
    """The files of the first output of each command, whichever run made it."""
    return {}


def _marks(seed: str, threads: str, sharding: str) -> list[pytest.MarkDecorator]:
    is_usual = seed == "1" or (threads, sharding) == ("5", "many")
    return [] if is_usual else [pytest.mark.slow]


# With the other hash seed one sharding is enough; pytest -m slow tries all.
RUNS = [
    pytest.param(seed, threads, sharding, marks=_marks(seed, threads, sharding))
    for seed in ("1", "2")
    for threads in ("1", "5")
    for sharding in SHARDINGS
]


@pytest.mark.parametrize(("seeded", "threads", "sharding"), RUNS, indirect=["seeded"])
@pytest.mark.parametrize("name", COMMANDS)
def test_every_file_has_the_same_bytes_for_any_threads_seed_and_sharding(
    name: str,
    threads: str,
    sharding: str,
    seeded: tuple[str, Forks],
    folders: dict[str, Path],
    first: dict[str, dict[str, bytes]],
    tmp_path: Path,
) -> None:
    _, forks = seeded
    options = ("--threads", threads, "--max-shard-size", "200KB", "--json")
    run = forks.run(
        *COMMANDS[name],
        *("reasoner", "mllm", "-o", str(tmp_path / "out"), *options),
        cwd=str(folders[sharding]),
        extent_bytes=10_000,
    )
    assert run.code == 0, run
    files = read_files(tmp_path / "out")
    assert sum(file.endswith(".safetensors") for file in files) > 1
    expected = first.setdefault(name, files)
    assert files.keys() == expected.keys()
    assert [file for file in files if files[file] != expected[file]] == []
