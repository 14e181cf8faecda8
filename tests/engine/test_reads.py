"""Every read of an input that fails, is short or finds an early end, one at a time, from below.

A small library, compiled here and preloaded, strikes the system calls themselves.
"""

import errno
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoints import SIDECARS, Pair, make_pair, read_files
from tests.faults.forks import Forks, Run
from tests.faults.harness import assert_refusal, command

SOURCE = Path(__file__).parents[1] / "benchmarks" / "faulty.c"
BATCH, NEVER = 6, 10**6


@pytest.fixture(scope="module")
def struck(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    if shutil.which("gcc") is None:
        pytest.skip("needs gcc")
    library = tmp_path_factory.mktemp("library") / "faulty.so"
    build = ["gcc", "-shared", "-fPIC", "-o", str(library), str(SOURCE), "-ldl"]
    subprocess.run(build, check=True)
    forks = Forks({"LD_PRELOAD": str(library)})
    yield forks
    forks.close()


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    folder = tmp_path_factory.mktemp("pair")
    sidecars = {name: SIDECARS[name] for name in ("LICENSE", "generation_config.json")}
    return make_pair(folder, layers=1, num_shards=(1, 2), mllm_sidecars=sidecars)


def run_at(
    forks: Forks, name: str, pair: Pair, folder: Path, numbers: list[int], do: object
) -> list[tuple[Path, Run]]:
    outs = [folder / f"out{at}" for at in numbers]
    requests: list[dict[str, Any]] = []
    for at, out in zip(numbers, outs, strict=True):
        faulty = {"FAULT_UNDER": pair.mllm.parent, "FAULT_CALLS": "read", "FAULT_DO": do}
        faulty["FAULT_AT"] = at
        values = {key: str(value) for key, value in faulty.items()}
        requests.append({"arguments": command(name, pair, out), "environment": values})
    return list(zip(outs, forks.run_all(requests), strict=True))


_EVERY = pytest.param(1, marks=pytest.mark.slow)


@pytest.mark.parametrize("step", [16, _EVERY])
@pytest.mark.parametrize("do", [errno.EIO, "end", "short"])
@pytest.mark.parametrize("name", ["linear", pytest.param("compute", marks=pytest.mark.slow)])
def test_a_read_that_fails_or_is_short_is_refused_or_makes_no_difference(
    name: str, do: object, step: int, struck: Forks, pair: Pair, tmp_path: Path
) -> None:
    ((whole, fresh),) = run_at(struck, name, pair, tmp_path, [NEVER], do)
    assert fresh.code == 0, fresh
    first, refused, wanted = 1, 0, read_files(whole)
    while True:
        numbers = list(range(first, first + BATCH * step, step))
        found = run_at(struck, name, pair, tmp_path, numbers, do)
        for out, run in found:
            if run.code == 0:
                assert read_files(out) == wanted, (out.name, do)
            else:
                assert_refusal(run, 5, [])
                assert not out.exists()
                refused += 1
        if (do == "short" and first > 60) or all(run.code == 0 for _, run in found):
            break
        first += BATCH * step
    assert (refused > 2) == (do != "short")
