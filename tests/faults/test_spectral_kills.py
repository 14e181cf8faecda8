"""kill -9 of what is made of singular directions: the rerun gives the bytes of one quiet run."""

import shutil
from pathlib import Path

import pytest

from tests.checkpoints import Pair, make_pair, read_files
from tests.faults.forks import CHANGES, Forks
from tests.faults.test_kills import (
    KILLED,
    assert_absent_or_whole,
    assert_finished_by_the_same_command,
    batches,
    partial_of,
    resumed,
)

COMMANDS = {
    "merge": ("drift-merge", "linear", "--rank", "1", "--norm", "frobenius"),
    "star": ("drift-merge", "star", "--base", "BASE"),
    "prior": ("drift-prior", "compute", "--rank", "2"),
}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return make_pair(tmp_path_factory.mktemp("pair"), layers=1, num_shards=(1, 2))


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_killed_anywhere_it_is_finished_with_the_same_bytes(
    name: str, forks: Forks, pair: Pair, tmp_path: Path
) -> None:
    program, method, *given = COMMANDS[name]
    options = [str(pair.reasoner) if word == "BASE" else word for word in given]

    def request(out: Path) -> dict[str, object]:
        words = [program, method, *pair.arguments, *options, "-o", str(out), "--threads", "1"]
        return {"arguments": words, "extent_bytes": 1500}

    quiet = forks.run_all([request(tmp_path / "whole") | {"count": CHANGES}])[0]
    assert quiet.code == 0, quiet
    whole, taken_over = read_files(tmp_path / "whole"), set()
    for numbers in batches(range(2, len(quiet.calls) + 1, 4)):
        outs = {at: tmp_path / f"out{at}" for at in numbers}
        killed = forks.strike({at: request(out) for at, out in outs.items()}, "kill")
        assert {run.code for run in killed} <= {KILLED, 0}, killed
        for out in outs.values():
            assert_absent_or_whole(out, whole)
        again = forks.run_all([request(out) for out in outs.values()])
        for out, run in zip(outs.values(), again, strict=True):
            assert_finished_by_the_same_command(run, out, whole)
            taken_over.add(resumed(run))
            shutil.rmtree(out)
            shutil.rmtree(partial_of(out), ignore_errors=True)
    assert len(taken_over) > 2, "no run was resumed in its middle"
