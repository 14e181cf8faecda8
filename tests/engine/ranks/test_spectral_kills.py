"""kill -9 of what is made of singular directions: the rerun gives the bytes of one quiet run."""

import re
from pathlib import Path

import pytest

from tests.checkpoints import make_pair, read_files
from tests.faults.forks import CHANGES, Forks

SPECTRAL = {
    "merge": ("drift-merge", "linear", "--rank", "1", "--norm", "frobenius"),
    "star": ("drift-merge", "star", "--base", "BASE"),
    "prior": ("drift-prior", "compute", "--rank", "2"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SPECTRAL)
def test_what_is_made_of_singular_directions_is_finished_with_the_same_bytes(
    name: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    pair = make_pair(tmp_path / "pair", layers=2, num_shards=(1, 2))
    forks = Forks()
    request.addfinalizer(forks.close)
    program, method, *given = SPECTRAL[name]
    options = [str(pair.reasoner) if word == "BASE" else word for word in given]

    def asked(out: Path) -> dict[str, object]:
        words = [program, method, *pair.arguments, *options, "-o", str(out), "--threads", "1"]
        return {"arguments": words, "extent_bytes": 300 if name == "prior" else 1500}

    quiet = forks.run_all([asked(tmp_path / "whole") | {"count": CHANGES}])[0]
    assert quiet.code == 0, quiet
    whole, taken_over = read_files(tmp_path / "whole"), set()
    for numbers in [range(at, at + 4) for at in range(2, len(quiet.calls) - 2, 16)]:
        outs = {at: tmp_path / f"out{at}" for at in numbers}
        killed = forks.strike({at: asked(out) for at, out in outs.items()}, "kill")
        assert {run.code for run in killed} <= {-9, 0}, killed
        for out in outs.values():
            assert not out.exists() or read_files(out) == whole
        again = forks.run_all([asked(out) for out in outs.values()])
        for out, run in zip(outs.values(), again, strict=True):
            assert read_files(out) == whole, run
            taken_over.update(re.findall(r"^Resumed: (\d+)", run.stderr, re.M))
    assert len(taken_over) > 1, "no run was resumed in its middle"
