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
def servers(forks: Forks) -> Iterator[dict[str, Forks]]:
    """By hash seed: what runs commands."""
    other = Forks({"PYTHONHASHSEED": "2"})
    yield {"1": forks, "2": other}
    other.close()


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


# Seed, threads, sharding. The other seed with one sharding, usually; pytest -m slow: with all.
ALL = [(seed, threads, one) for seed in ("1", "2") for threads in ("1", "5") for one in SHARDINGS]
USUAL = [run for run in ALL if run[0] == "1" or run[1:] == ("5", "many")]


@pytest.mark.parametrize("runs", [USUAL, pytest.param(ALL, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", COMMANDS)
def test_every_file_has_the_same_bytes_for_any_threads_seed_and_sharding(
    name: str,
    runs: list[tuple[str, str, str]],
    servers: dict[str, Forks],
    folders: dict[str, Path],
    tmp_path: Path,
) -> None:
    found = {}
    for number, (seed, threads, sharding) in enumerate(runs):
        out = tmp_path / str(number)
        options = ("--threads", threads, "--max-shard-size", "200KB", "--json")
        run = servers[seed].run(
            *COMMANDS[name],
            *("reasoner", "mllm", "-o", str(out), *options),
            cwd=str(folders[sharding]),
            extent_bytes=10_000,
        )
        assert run.code == 0, run
        found[seed, threads, sharding] = read_files(out)
    expected = found[runs[0]]
    assert sum(file.endswith(".safetensors") for file in expected) > 1
    for how, files in found.items():
        assert files.keys() == expected.keys(), how
        assert [file for file in files if files[file] != expected[file]] == [], how
