"""kill -9, Ctrl-C and failing system calls at every call that changes the disk.

At each of them OUT is absent or whole, and the same command again gives the same bytes as a run
that nobody disturbed.
"""

import errno
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoints import SIDECARS, Pair, make_pair, read_files
from tests.faults.forks import CHANGES, RENAMES, SYNCS, Forks, Run
from tests.faults.harness import assert_refusal, command

BATCH = 6  # runs at a time
FLUSH_BYTES = {"compute": 3000, "linear": 3000, "compress": 700}  # several in tiny outputs
NAMES = ("compute", "linear", "compress")  # the last of the output of the first
_slow = [pytest.param(name, marks=pytest.mark.slow) for name in ("compute", "compress")]
USUAL = ["linear", *_slow]
KILLED = -9
FAILING = {
    errno.ENOSPC: ("pwrite", "write", "posix_fallocate", "ftruncate", "mkdir", "open"),
    errno.EIO: (*SYNCS, *RENAMES, "pwrite"),
}


@dataclass(frozen=True)
class World:
    """A pair, and what an undisturbed run makes of it."""

    forks: Forks
    pair: Pair
    whole: dict[str, dict[str, bytes]]  # command -> files of its output
    calls: dict[str, list[str]]  # command -> every call of its run that changes the disk

    def request(self, name: str, out: Path, *options: str, **request: Any) -> dict[str, Any]:
        arguments = [*command(name, self.pair, out), *options]
        return {"arguments": arguments, "extent_bytes": FLUSH_BYTES[name], **request}

    def run(self, name: str, out: Path, *options: str, **request: Any) -> Run:
        return self.forks.run_all([self.request(name, out, *options, **request)])[0]


@pytest.fixture(scope="module")
def world(forks: Forks, tmp_path_factory: pytest.TempPathFactory) -> World:
    directory = tmp_path_factory.mktemp("world")
    sidecars = {name: SIDECARS[name] for name in ("LICENSE", "remote/modeling_tiny.py")}
    pair = make_pair(directory, layers=1, num_shards=(1, 2), mllm_sidecars=sidecars)
    world = World(forks, pair, {}, {})
    for name in NAMES:
        run = world.run(name, directory / name, count=CHANGES)
        assert run.code == 0, run
        world.calls[name] = run.calls
        world.whole[name] = read_files(directory / name)
    return world


def partial_of(out: Path) -> Path:
    return out.with_name(f"{out.name}.partial")


def every_third(name: str, total: int) -> range:
    """Numbers of calls, from 1: those of the three commands together are every place there is."""
    return range(1 + NAMES.index(name), total + 1, len(NAMES))


def batches(items: Sequence[Any]) -> Iterator[Sequence[Any]]:
    for begin in range(0, len(items), BATCH):
        yield items[begin : begin + BATCH]


def resumed(run: Run) -> int:
    """How many tensors a run took over from an earlier one."""
    for line in run.stderr.splitlines():
        if line.startswith("Resumed: "):
            return int(line.split()[1])
    return 0


def assert_absent_or_whole(out: Path, whole: dict[str, bytes]) -> None:
    assert not out.exists() or read_files(out) == whole


def assert_finished_by_the_same_command(run: Run, out: Path, whole: dict[str, bytes]) -> None:
    """The rerun succeeds; or it finds OUT whole, with nothing left that tells who made it."""
    assert read_files(out) == whole
    if run.code == 0:
        assert not partial_of(out).exists()
    else:
        assert_refusal(run, 6, ["exists already"])
        assert not read_files(partial_of(out)).keys() - {"lock"}


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] * (name != "compute")) for name in NAMES],
)
def test_a_run_killed_at_any_call_leaves_out_absent_or_whole_and_is_finished_by_a_rerun(
    name: str, world: World, tmp_path: Path
) -> None:
    taken_over = []
    refusals = 0
    for numbers in batches(range(1, len(world.calls[name]) + 1)):
        outs = [tmp_path / f"out{number}" for number in numbers]
        requests = {at: world.request(name, out) for at, out in zip(numbers, outs, strict=True)}
        killed = world.forks.strike(requests, "kill")
        for out, run in zip(outs, killed, strict=True):
            assert run.code in (KILLED, 0), run  # 0: threads made fewer calls this time
            assert_absent_or_whole(out, world.whole[name])
        again = world.forks.run_all([world.request(name, out) for out in outs])
        for out, before, run in zip(outs, killed, again, strict=True):
            assert_finished_by_the_same_command(run, out, world.whole[name])
            refusals += before.code == KILLED and run.code != 0
            taken_over.append(resumed(run))
            shutil.rmtree(out)
            shutil.rmtree(partial_of(out), ignore_errors=True)
    # At most when killed between the removal of the journal, of the lock and of their folder.
    assert refusals <= 2
    assert max(taken_over) == {"compute": 10, "linear": 26, "compress": 10}[name]
    assert len(set(taken_over)) > 2, "no run was resumed in its middle"


@pytest.mark.parametrize("name", USUAL)
def test_ctrl_c_at_any_call_exits_130_and_is_finished_by_a_rerun(
    name: str, world: World, tmp_path: Path
) -> None:
    codes = []
    for numbers in batches(every_third(name, len(world.calls[name]))):
        outs = [tmp_path / f"out{number}" for number in numbers]
        requests = {at: world.request(name, out) for at, out in zip(numbers, outs, strict=True)}
        stopped = world.forks.strike(requests, "interrupt")
        for out, run in zip(outs, stopped, strict=True):
            assert run.code in (130, 0), run
            assert "Traceback" not in run.stderr
            assert run.code == 0 or "Error: interrupted" in run.stderr
            assert_absent_or_whole(out, world.whole[name])
            codes.append(run.code)
        outs = [out for out, run in zip(outs, stopped, strict=True) if run.code]
        again = world.forks.run_all([world.request(name, out) for out in outs])
        for out, run in zip(outs, again, strict=True):
            assert_finished_by_the_same_command(run, out, world.whole[name])
    assert codes.count(130) > len(codes) // 2


@pytest.mark.parametrize("name", USUAL)
def test_a_run_of_several_threads_killed_anywhere_is_finished_by_a_rerun(
    name: str, world: World, tmp_path: Path
) -> None:
    options = ("--threads", "3")
    for numbers in batches(range(1, len(world.calls[name]) + 1, 4)):
        outs = [tmp_path / f"out{number}" for number in numbers]
        requests = {
            at: world.request(name, out, *options) for at, out in zip(numbers, outs, strict=True)
        }
        killed = world.forks.strike(requests, "kill")
        assert {run.code for run in killed} <= {KILLED, 0}
        again = world.forks.run_all([world.request(name, out, *options) for out in outs])
        for out, run in zip(outs, again, strict=True):
            assert_finished_by_the_same_command(run, out, world.whole[name])


@pytest.mark.parametrize("always", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("number", FAILING)
@pytest.mark.parametrize("name", NAMES)
def test_a_call_that_fails_stops_the_run_cleanly_and_is_finished_by_a_rerun(
    name: str, number: int, always: bool, world: World, tmp_path: Path
) -> None:
    kinds = FAILING[number]
    total = sum(call in kinds for call in world.calls[name])
    for positions in batches(every_third(name, total)):
        outs = [tmp_path / f"out{at}" for at in positions]
        requests = {at: world.request(name, out) for at, out in zip(positions, outs, strict=True)}
        failed = world.forks.strike(requests, number, count=kinds, always=always)
        for at, out, run in zip(positions, outs, failed, strict=True):
            assert_absent_or_whole(out, world.whole[name])
            if run.code == 0:
                # Threads made fewer calls this time; or the folder was there already.
                assert len(run.calls) < at or run.calls[at - 1] == "mkdir", run
                assert out.exists()
                continue
            assert run.code == 6, run
            assert "Traceback" not in run.stderr
            assert "cannot be written" in run.stderr
            assert str(out) in run.stderr
            assert "run the same command again" in run.stderr
        outs = [out for out, run in zip(outs, failed, strict=True) if run.code]
        again = world.forks.run_all([world.request(name, out) for out in outs])
        for out, run in zip(outs, again, strict=True):
            assert run.code == 0, run
            assert_finished_by_the_same_command(run, out, world.whole[name])


@pytest.mark.parametrize("name", NAMES)
def test_writes_that_take_one_byte_at_a_time_give_the_same_bytes(
    name: str, world: World, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    run = world.run(name, out, count=("pwrite", "write"), do="short")
    assert run.code == 0, run
    assert len(run.calls) > 1000
    assert read_files(out) == world.whole[name]


# --overwrite: the old OUT is intact until the new one is in its place.


@pytest.fixture(scope="module")
def old(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An output of other options, to be replaced."""
    out = tmp_path_factory.mktemp("old") / "out"
    assert world.run("linear", out, "--weight", "0.5").code == 0
    assert read_files(out) != world.whole["linear"]
    return out


def copies(old: Path, directory: Path, count: int) -> list[Path]:
    return [Path(shutil.copytree(old, directory / f"out{i}")) for i in range(count)]


def swap_calls(world: World, old: Path, directory: Path) -> list[int]:
    """The numbers of the calls from just before the first rename to the end."""
    (out,) = copies(old, directory / "count", 1)
    run = world.run("linear", out, "--overwrite", count=CHANGES)
    assert run.code == 0, run
    assert run.calls.count("rename") == 2
    assert read_files(out) == world.whole["linear"]
    first = run.calls.index("rename") + 1
    return list(range(first - 2, len(run.calls) + 1))


def test_a_kill_while_out_is_replaced_leaves_the_old_or_the_new_and_a_rerun_finishes(
    world: World, old: Path, tmp_path: Path
) -> None:
    before, after = read_files(old), world.whole["linear"]
    seen = set()
    for number, numbers in enumerate(batches(swap_calls(world, old, tmp_path))):
        outs = copies(old, tmp_path / str(number), len(numbers))
        requests = {
            at: world.request("linear", out, "--overwrite")
            for at, out in zip(numbers, outs, strict=True)
        }
        killed = world.forks.strike(requests, "kill")
        for out, run in zip(outs, killed, strict=True):
            assert run.code == KILLED, run
            if out.exists():
                assert read_files(out) in (before, after)
                seen.add("old" if read_files(out) == before else "new")
            else:
                assert read_files(partial_of(out) / "replaced") == before
                seen.add("between")
        again = world.forks.run_all([world.request("linear", out, "--overwrite") for out in outs])
        for out, run in zip(outs, again, strict=True):
            assert run.code == 0, run
            assert read_files(out) == after
            assert not partial_of(out).exists()
    assert seen == {"old", "new", "between"}


def test_ctrl_c_while_out_is_replaced_never_leaves_it_absent(
    world: World, old: Path, tmp_path: Path
) -> None:
    before, after = read_files(old), world.whole["linear"]
    numbers = swap_calls(world, old, tmp_path)
    outs = copies(old, tmp_path / "outs", len(numbers))
    for at, out in zip(numbers, outs, strict=True):
        run = world.run("linear", out, "--overwrite", count=CHANGES, at=at, do="interrupt")
        assert run.code in (130, 0), run
        assert read_files(out) in (before, after)
        assert run.code == 130 or read_files(out) == after


@pytest.mark.parametrize("at", [1, 2])
def test_a_rename_that_fails_leaves_the_old_out_in_its_place(
    at: int, world: World, old: Path, tmp_path: Path
) -> None:
    (out,) = copies(old, tmp_path, 1)
    run = world.run("linear", out, "--overwrite", count=RENAMES, at=at, do=errno.EIO)
    assert_refusal(run, 6, [str(out), "cannot be written"])
    assert read_files(out) == read_files(old)
    assert world.run("linear", out, "--overwrite").code == 0
    assert read_files(out) == world.whole["linear"]


def test_the_old_out_is_put_back_when_another_command_follows_a_kill_within_the_swap(
    world: World, old: Path, tmp_path: Path
) -> None:
    (out,) = copies(old, tmp_path, 1)
    run = world.run("linear", out, "--overwrite", count=RENAMES, at=2, do="kill")
    assert run.code == KILLED
    assert not out.exists()
    run = world.run("linear", out, "--overwrite", "--weight", "0.7")
    assert_refusal(run, 6, [f"rm -r {partial_of(out)}"])
    assert read_files(out) == read_files(old)


def test_a_failed_restoration_keeps_the_old_out_and_the_next_run_puts_it_back(
    world: World, old: Path, tmp_path: Path
) -> None:
    (out,) = copies(old, tmp_path, 1)
    run = world.run("linear", out, "--overwrite", count=RENAMES, at=2, do=errno.EIO, always=True)
    assert run.code == 6, run
    assert "Traceback" not in run.stderr
    assert not out.exists()
    assert read_files(partial_of(out) / "replaced") == read_files(old)
    assert world.run("linear", out, "--overwrite").code == 0
    assert read_files(out) == world.whole["linear"]
