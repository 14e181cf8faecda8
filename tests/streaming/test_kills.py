"""`--stream` killed, interrupted, short of disk: OUT absent or whole, a rerun fetches the rest."""

import errno
import random
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests import checkpoints
from tests.checkpoints import Pair, read_files
from tests.faults.forks import CHANGES, NO_MOUNT, Forks, Run
from tests.faults.harness import assert_refusal
from tests.hub_server.client import environment
from tests.hub_server.models import (
    MLLM,
    REASONER,
    downloads,
    make_layered_pair,
    publish,
    shard_bytes,
    whole_request,
)
from tests.hub_server.repo import sha256
from tests.hub_server.server import HubServer

BATCH = 4
KILLED = -9
FLUSH_BYTES = 1000
COMMANDS = {
    "compute": ("drift-prior", "compute", REASONER, MLLM),
    "linear": ("drift-merge", "linear", REASONER, MLLM),
}


@dataclass(frozen=True)
class World:
    """A Hub, models on it, and what undisturbed runs make of them."""

    hub: HubServer
    forks: Forks
    pair: Pair
    whole: dict[str, dict[str, bytes]]  # command -> files of its output
    calls: dict[str, list[str]]  # command -> every call of its run that changes the disk

    def request(self, name: str, out: Path, *options: str, **request: Any) -> dict[str, Any]:
        arguments = [*COMMANDS[name], "-o", str(out), "--stream", "--threads", "1", *options]
        return {"arguments": arguments, "extent_bytes": FLUSH_BYTES, **request}

    def run(self, name: str, out: Path, *options: str, **request: Any) -> Run:
        return self.forks.run_all([self.request(name, out, *options, **request)])[0]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    directory = tmp_path_factory.mktemp("streaming")
    with HubServer() as hub:
        pair = make_layered_pair(directory / "models", num_shards=(5, 6))
        publish(hub, pair)
        forks = Forks(environment(hub, directory / "home") | {"HF_TOKEN": ""})
        world = World(hub, forks, pair, {}, {})
        try:
            for name in COMMANDS:
                run = world.run(name, directory / name, count=CHANGES)
                assert run.code == 0, run
                world.calls[name] = run.calls
                world.whole[name] = read_files(directory / name)
            yield world
        finally:
            forks.close()


@pytest.fixture(autouse=True)
def at_full_speed(world: World) -> Iterator[None]:
    yield
    world.hub.bytes_per_second = 0.0
    world.hub.faults.clear()


def sample(total: int, count: int, seed: int) -> list[list[int]]:
    """Random numbers of calls, in batches."""
    chosen = sorted(random.Random(seed).sample(range(1, total + 1), min(count, total)))
    return [chosen[begin : begin + BATCH] for begin in range(0, len(chosen), BATCH)]


def partial_of(out: Path) -> Path:
    return out.with_name(f"{out.name}.partial")


def resumed(run: Run) -> int:
    """How many tensors a run took over from an earlier one."""
    found = re.search(r"^Resumed: (\d+)", run.stderr, re.M)
    return int(found[1]) if found else 0


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_a_streamed_run_killed_at_random_calls_is_finished_by_a_rerun(
    name: str, world: World, tmp_path: Path
) -> None:
    world.hub.bytes_per_second = 500_000  # slow enough that downloads are under way when it dies
    taken_over, left = set(), set()
    for numbers in sample(len(world.calls[name]), 60, seed=1):
        outs = [tmp_path / f"out{number}" for number in numbers]
        requests = {at: world.request(name, out) for at, out in zip(numbers, outs, strict=True)}
        killed = world.forks.strike(requests, "kill")
        for out, run in zip(outs, killed, strict=True):
            assert run.code in (KILLED, 0), run  # 0: threads made fewer calls this time
            assert not out.exists() or read_files(out) == world.whole[name]
            left |= {path.suffix for path in partial_of(out).glob("shards/**/*") if path.is_file()}
        again = world.forks.run_all([world.request(name, out) for out in outs])
        for out, run in zip(outs, again, strict=True):
            assert read_files(out) == world.whole[name]
            if run.code != 0:  # killed after publishing, with nothing left that tells whose it is
                assert_refusal(run, 6, ["exists already"])
            else:
                assert not partial_of(out).exists()
            taken_over.add(resumed(run))
            shutil.rmtree(out)
            shutil.rmtree(partial_of(out), ignore_errors=True)
    assert len(taken_over) > 2, "no run was resumed in its middle"
    assert left >= {".safetensors", ".incomplete"}, "no run was killed during a download"


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_ctrl_c_during_a_streamed_run_exits_130_and_is_finished_by_a_rerun(
    name: str, world: World, tmp_path: Path
) -> None:
    world.hub.bytes_per_second = 500_000
    codes = []
    for numbers in sample(len(world.calls[name]), 12, seed=2):
        outs = [tmp_path / f"out{number}" for number in numbers]
        # The run and each of its downloads come to that number: some press Ctrl-C three times.
        requests = {at: world.request(name, out) for at, out in zip(numbers, outs, strict=True)}
        stopped = world.forks.strike(requests, "interrupt")
        for out, run in zip(outs, stopped, strict=True):
            assert run.code in (130, 0), run.stderr
            assert "Traceback" not in run.stderr
            assert not out.exists() or read_files(out) == world.whole[name]
            assert not list(partial_of(out).rglob("*.incomplete"))
            codes.append(run.code)
        outs = [out for out, run in zip(outs, stopped, strict=True) if run.code]
        again = world.forks.run_all([world.request(name, out) for out in outs])
        for out, run in zip(outs, again, strict=True):
            assert run.code == 0, run
            assert read_files(out) == world.whole[name]
    assert 130 in codes


def test_a_rerun_fetches_only_what_is_still_to_be_read(world: World, tmp_path: Path) -> None:
    out = tmp_path / "out"
    limit = ("--cache-limit", "30KB")  # less than half of all: most shards have gone by then
    lines = world.calls["linear"].count("write")  # of the journal
    killed = world.run("linear", out, *limit, count=("write",), at=lines - 1, do="kill")
    assert killed.code == KILLED
    before = set(downloads(world.hub))
    world.hub.forget_requests()
    again = world.run("linear", out, *limit)
    assert again.code == 0, again
    assert resumed(again) > 30
    fetched = downloads(world.hub)
    assert len(fetched) <= 4 < len(before)
    assert read_files(out) == world.whole["linear"]


def test_a_run_killed_again_and_again_ends_with_the_same_bytes(
    world: World, tmp_path: Path
) -> None:
    world.hub.bytes_per_second = 500_000
    out = tmp_path / "out"
    generator = random.Random(3)
    kills = 0
    run = world.run("linear", out, count=CHANGES, at=generator.randint(40, 160), do="kill")
    while not out.exists() and kills < 100:
        assert run.code == KILLED, run
        kills += 1
        run = world.run("linear", out, count=CHANGES, at=generator.randint(40, 160), do="kill")
    assert kills > 1
    assert read_files(out) == world.whole["linear"]


def test_a_hub_that_breaks_down_half_way_is_exit_3_and_the_rerun_resumes(
    world: World, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    last = max(world.pair.mllm.glob("*.safetensors"))
    world.hub.inject(whole_request(last), status=403)
    assert_refusal(world.run("linear", out), 3, ["HTTP 403", "hf auth login"])
    world.hub.faults.clear()
    world.hub.forget_requests()
    again = world.run("linear", out)
    assert again.code == 0, again
    assert resumed(again) > 10
    assert set(downloads(world.hub)) <= {sha256(last), sha256(max(world.pair.reasoner.glob("*s")))}
    assert read_files(out) == world.whole["linear"]


@pytest.mark.parametrize("blind", [False, True])
def test_a_disk_that_is_full_is_said_so_whether_it_tells_beforehand_or_not(
    blind: bool, world: World, tmp_path: Path
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    total = shard_bytes(world.pair.reasoner) + shard_bytes(world.pair.mllm)
    run = world.run(
        "linear", disk / "out", disk=disk, disk_bytes=total // 4096 * 4096 - 8192, blind=blind
    )
    if run.code == NO_MOUNT:
        pytest.skip("this user may not mount")
    assert run.code == 6, run
    assert "Traceback" not in run.stderr
    assert ("for shards from the Hub" in run.stderr) == (not blind)
    # Unwarned, the output may be the first to meet the full disk.
    assert "--cache-limit" in run.stderr or (blind and "Free some space" in run.stderr)


@pytest.fixture(scope="module")
def large(world: World, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """A pair of 11 MB in shards of 1.5 MB, in the place of the small one."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"HIDDEN": 256, "KV": 128, "INTERMEDIATE": 512, "VISION": 64}.items():
            patch.setattr(checkpoints, name, value)
        folder = tmp_path_factory.mktemp("large")
        pair = make_layered_pair(folder, layers=8, num_shards=(7, 8))
    for repo_id, model in (("org/large-reasoner", pair.reasoner), ("org/large-mllm", pair.mllm)):
        world.hub.add_commit(repo_id, model)
    return pair


@pytest.mark.parametrize("threads", ["1", "3"])
def test_a_disk_that_holds_the_output_and_the_limit_is_enough_for_processes_too(
    threads: str, world: World, large: Pair, tmp_path: Path
) -> None:
    """What is deleted but open or mapped in any process would fill the disk."""
    out = tmp_path / "disk" / "out"
    out.parent.mkdir()
    limit = 4_000_000
    run = world.forks.run(
        *("drift-merge", "linear", "org/large-reasoner", "org/large-mllm", "-o", str(out)),
        *("--stream", "--cache-limit", str(limit), "--threads", threads),
        process_bytes=0,
        disk=out.parent,
        disk_bytes=shard_bytes(large.mllm) + limit + 700_000,  # small files, whole pages
    )
    if run.code == NO_MOUNT:
        pytest.skip("this user may not mount")
    assert run.code == 0, run
    assert "Downloaded" in run.stderr
    assert run.left == ["out"]


@pytest.mark.slow
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_calls_that_fail_stop_a_streamed_run_cleanly(
    number: int, world: World, tmp_path: Path
) -> None:
    kinds = ("pwrite", "posix_fallocate", "ftruncate", "mkdir", "fsync", "fdatasync")
    total = sum(call in kinds for call in world.calls["compute"])
    for positions in sample(total, 12, seed=number):
        outs = [tmp_path / f"out{at}" for at in positions]
        failed = world.forks.run_all(
            [
                world.request("compute", out, count=kinds, at=at, do=number, always=True)
                for at, out in zip(positions, outs, strict=True)
            ]
        )
        for out, run in zip(outs, failed, strict=True):
            assert run.code in (6, 0), run
            assert "Traceback" not in run.stderr
            assert not out.exists() or read_files(out) == world.whole["compute"]
        again = world.forks.run_all([world.request("compute", out) for out in outs])
        for out, before, run in zip(outs, failed, again, strict=True):
            assert before.code == 0 or run.code == 0, run
            assert read_files(out) == world.whole["compute"]
