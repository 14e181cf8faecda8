"""A push killed with -9 at any moment, and taken up again by the same command."""

import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tests.checkpoints import read_files
from tests.faults.forks import CHANGES, SENDS, Forks
from tests.hub.places import REPO, TOKEN, Artifacts, files_at, shards_of
from tests.hub.pushed import World
from tests.hub_server.client import environment
from tests.hub_server.server import HubServer
from tests.hub_server.store import Account

SEED = 20_251_122
KILLED = -9


@pytest.fixture(scope="module")
def world(built: Artifacts, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("killed")
    with HubServer(folder / "store") as hub:
        hub.accounts[TOKEN] = Account("alice", orgs=("org",))
        forks = Forks(environment(hub, folder / "home") | {"HF_TOKEN": TOKEN})
        try:
            arguments = World(hub, forks, built.prior, range(0)).push("org/whole")
            run = forks.run(*arguments, count=SENDS)
            assert run.code == 0, run
            requests = [exchange.path for exchange in hub.requests()]
            first = requests.index("/api/repos/create") + 1
            yield World(hub, forks, built.prior, range(first, len(run.calls) + 1))
        finally:
            forks.close()


def killed_and_resumed(world: World, moments: Sequence[int]) -> list[str]:
    """Kill pushes when they are about to send something; finish each. How far each had come."""
    stages = []
    for at in moments:
        repo_id = f"org/killed{at}-of-{len(moments)}"
        world.hub.store.lfs.clear()  # each repository begins without what the others have sent
        killed = world.forks.run(*world.push(repo_id), count=SENDS, at=at, do="kill")
        assert killed.code in (KILLED, 0), killed  # 0: it has sent fewer pieces this time
        stages.append(world.stage_of(repo_id, killed.code))
        done = world.forks.run(*world.push(repo_id))
        assert done.code == 0, done
        world.assert_whole(repo_id)
    return stages


@pytest.mark.slow
def test_a_push_killed_now_and_then_is_completed_by_the_same_command(world: World) -> None:
    stages = killed_and_resumed(world, world.moments[3 :: len(world.moments) // 4])
    assert len(set(stages)) >= 2, stages


@pytest.mark.slow
def test_a_push_killed_at_each_moment_is_completed_by_the_same_command(world: World) -> None:
    stages = killed_and_resumed(world, world.moments)
    assert sum(stage.endswith("files") for stage in stages) >= 10, stages
    assert len(set(stages)) >= 4, stages


@pytest.mark.slow
def test_a_pull_killed_at_random_moments_is_completed_by_the_same_command(
    world: World, tmp_path: Path
) -> None:
    assert world.forks.run(*world.push(REPO)).code == 0
    pull = ["drift-prior", "pull", REPO, "-q", "-o"]
    count = (*CHANGES, *SENDS)
    whole = world.forks.run(*pull, str(tmp_path / "whole"), count=count)
    assert whole.code == 0, whole
    expected = {n: data for n, data in files_at(world.hub).items() if n != ".gitattributes"}
    assert read_files(tmp_path / "whole") == expected
    found = set()
    for at in random.Random(SEED).sample(range(1, len(whole.calls) + 1), 8):
        out = tmp_path / f"out{at}"
        killed = world.forks.run(*pull, str(out), count=count, at=at, do="kill")
        assert killed.code in (KILLED, 0), killed
        assert not out.exists() or read_files(out) == expected
        found.add(len(list(tmp_path.glob(f"out{at}.partial/payload/*.safetensors"))))
        if not out.exists():
            assert world.forks.run(*pull, str(out)).code == 0
        assert read_files(out) == expected
        assert not out.with_name(f"{out.name}.partial").exists()
    assert len(found) > 2, found


def test_ctrl_c_says_that_the_same_command_completes_it(world: World) -> None:
    push = world.push("org/interrupted")
    middle = world.moments[len(world.moments) // 2]
    run = world.forks.run(*push, count=SENDS, at=middle, do="interrupt")
    assert run.code == 130, run
    assert run.stdout == ""
    assert "org/interrupted is incomplete, without its card" in run.stderr
    assert "Traceback" not in run.stderr
    assert len(shards_of(world.prior)) > 8
    assert world.forks.run(*push).code == 0
    assert "README.md" in files_at(world.hub, "org/interrupted")
