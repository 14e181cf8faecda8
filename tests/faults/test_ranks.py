"""Several ranks of one command, as torchrun starts them: equal bytes, and one end for all.

Each rank is a fork with torchrun's variables; the first serves the store, as without an agent.
"""

import errno
import shutil
from pathlib import Path

import pytest

from tests.checkpoints import Pair, make_pair, read_files
from tests.faults.forks import CHANGES, Forks, run_ranks

ANCESTOR = ("ties", "task-arithmetic")
COMMANDS = {
    "compute": ("drift-prior", "compute"),
    "linear": ("drift-merge", "linear"),
    "slerp": ("drift-merge", "slerp"),
    "ties": ("drift-merge", "ties", "--trim", "global"),
    "task-arithmetic": ("drift-merge", "task-arithmetic", "--weight", "frank"),
}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return make_pair(tmp_path_factory.mktemp("pair"), layers=2, num_shards=(1, 2))


def command(name: str, pair: Pair, out: Path, *options: str) -> list[str]:
    base = ["--base", str(pair.reasoner)] if name in ANCESTOR else []
    words = [*COMMANDS[name], *pair.arguments, *base, "-o", str(out), "--threads", "1"]
    return [*words, "--max-shard-size", "3KB", *options]


def whole(forks: Forks, name: str, pair: Pair, out: Path) -> dict[str, bytes]:
    run = forks.run(*command(name, pair, out))
    assert run.code == 0, run
    return read_files(out)


@pytest.mark.parametrize(
    ("name", "size"),
    [
        pytest.param(name, size, marks=[pytest.mark.slow] * ((name, size) != ("ties", 3)))
        for name in COMMANDS
        for size in (2, 3, 4, 7)
    ],
)
def test_any_number_of_ranks_gives_the_bytes_of_one_process(
    name: str, size: int, forks: Forks, pair: Pair, tmp_path: Path
) -> None:
    alone = whole(forks, name, pair, tmp_path / "out")
    shutil.rmtree(tmp_path / "out")
    runs = run_ranks(forks, size, command(name, pair, tmp_path / "out"))
    assert [run.code for run in runs] == [0] * size, runs
    assert read_files(tmp_path / "out") == alone
    assert runs[0].stdout.strip().endswith(str(tmp_path / "out"))
    assert [run.stdout + run.stderr for run in runs[1:]] == [""] * (size - 1)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4])
def test_a_check_is_shared_and_finds_what_one_process_finds(
    size: int, forks: Forks, pair: Pair, tmp_path: Path
) -> None:
    whole(forks, "linear", pair, tmp_path / "out")
    arguments = ["drift-merge", "verify", str(tmp_path / "out"), "--threads", "1", "--seed", "1"]
    sources = ["--reasoner", str(pair.reasoner), "--mllm", str(pair.mllm)]
    alone = forks.run(*arguments, *sources)
    runs = run_ranks(forks, size, [*arguments, *sources])
    assert [run.code for run in runs] == [0] * size, runs
    assert runs[0].stdout == alone.stdout
    for path in sorted((tmp_path / "out").glob("*.safetensors")):
        path.write_bytes(path.read_bytes()[:-1] + b"\x7f")
    alone = forks.run(*arguments)
    runs = run_ranks(forks, size, arguments)
    assert [run.code for run in runs] == [alone.code] * size == [1] * size, runs
    assert runs[0].stderr == alone.stderr
    assert not any(run.stderr for run in runs[1:])


def test_an_error_of_one_rank_is_the_end_of_all_and_told_once(
    forks: Forks, pair: Pair, tmp_path: Path
) -> None:
    full = {"count": ("pwrite",), "at": 3, "do": errno.ENOSPC, "always": True}
    arguments = command("linear", pair, tmp_path / "out")
    runs = run_ranks(forks, 3, arguments, {1: full})
    assert [run.code for run in runs] == [6, 6, 6], runs
    assert "Error: On rank 1 (" in runs[0].stderr
    assert "No space left on device" in runs[0].stderr
    assert not any(run.stdout or run.stderr for run in runs[1:])
    assert not (tmp_path / "out").exists()
    runs = run_ranks(forks, 2, arguments)
    assert [run.code for run in runs] == [0, 0], runs
    assert "Resumed: " in runs[0].stderr
    shutil.move(tmp_path / "out", tmp_path / "ranks")
    assert read_files(tmp_path / "ranks") == whole(forks, "linear", pair, tmp_path / "out")


@pytest.mark.slow
def test_what_all_ranks_refuse_is_told_once_and_is_nobodys(
    forks: Forks, pair: Pair, tmp_path: Path
) -> None:
    (tmp_path / "out" / "kept").mkdir(parents=True)
    runs = run_ranks(forks, 2, command("linear", pair, tmp_path / "out"))
    assert [run.code for run in runs] == [6, 6], runs
    assert f"Error: {tmp_path / 'out'} exists already." in runs[0].stderr
    assert runs[1].stderr == ""
    runs = run_ranks(forks, 2, command("linear", pair, tmp_path / "out", "--weight", "x"))
    assert [run.code for run in runs] == [2, 2], runs
    assert runs[0].stderr.count("Error") == 1
    assert runs[1].stderr == ""


@pytest.mark.parametrize(
    "victim", [pytest.param(0, marks=pytest.mark.slow), 1, pytest.param(2, marks=pytest.mark.slow)]
)
def test_a_killed_rank_is_named_and_another_number_of_ranks_finishes(
    victim: int, forks: Forks, pair: Pair, tmp_path: Path
) -> None:
    arguments = command("linear", pair, tmp_path / "out")
    kill = {"count": CHANGES, "at": 12, "do": "kill"}
    runs = run_ranks(forks, 3, arguments, {victim: kill})
    assert runs[victim].code == -9
    others = [run for rank, run in enumerate(runs) if rank != victim]
    assert [run.code for run in others] == [70, 70], runs
    told = "".join(run.stderr for run in others)
    # The store goes with the first rank: then nobody else can say that it was told.
    assert told.count("Error: ") == (2 if victim == 0 else 1), runs
    assert f"rank {victim} (" in told
    assert "it resumes where it stopped" in told
    assert not (tmp_path / "out").exists()
    for size in (2, 4):
        runs = run_ranks(forks, size, arguments)
        if size == 2:
            assert [run.code for run in runs] == [0, 0], runs
            shutil.move(tmp_path / "out", tmp_path / "ranks")
    assert read_files(tmp_path / "out") == read_files(tmp_path / "ranks")
    shutil.rmtree(tmp_path / "out")
    assert read_files(tmp_path / "ranks") == whole(forks, "linear", pair, tmp_path / "out")


@pytest.mark.slow
def test_a_command_that_one_process_does_is_done_by_the_first_rank(
    forks: Forks, pair: Pair, tmp_path: Path
) -> None:
    whole(forks, "linear", pair, tmp_path / "out")
    runs = run_ranks(forks, 2, ["drift-merge", "inspect", str(tmp_path / "out")])
    assert [run.code for run in runs] == [0, 0], runs
    assert runs[0].stdout
    assert not runs[1].stdout


@pytest.mark.slow
def test_a_sweep_is_shared(forks: Forks, pair: Pair, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"method: linear\nreasoner: [{pair.reasoner}]\nmllm: {pair.mllm}\n")
    words = ["drift-merge", "sweep", str(recipe), "--set", "weight=0.2,0.4", "--threads", "1"]
    alone = forks.run(*words, "-o", str(tmp_path / "alone"))
    assert alone.code == 0, alone
    runs = run_ranks(forks, 3, [*words, "-o", str(tmp_path / "ranks")])
    assert [run.code for run in runs] == [0, 0, 0], runs
    assert read_files(tmp_path / "ranks") == read_files(tmp_path / "alone")
