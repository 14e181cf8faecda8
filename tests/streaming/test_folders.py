"""The folders of models on the Hub: what a merge carries over comes along, and nothing else."""

import json
from pathlib import Path

import pytest

from tests import checkpoints as c
from tests.faults.harness import run
from tests.faults.inputs.folders import LEFT, OTHERS
from tests.hub_server.client import go_offline
from tests.hub_server.models import MLLM, REASONER, make_layered_pair, publish
from tests.hub_server.server import HubServer

COMMAND = ["drift-merge", "linear", REASONER, MLLM, "--threads", "1"]


@pytest.fixture
def pair(hub: HubServer, tmp_path: Path) -> c.Pair:
    """Models whose folders hold weights of others, copies, and states of a training."""
    pair = make_layered_pair(tmp_path / "models")
    for side in pair:
        for name, data in (OTHERS | LEFT).items():
            if side == pair.mllm or name != "adapter_config.json":
                (side / name).parent.mkdir(parents=True, exist_ok=True)
                (side / name).write_bytes(data)
    publish(hub, pair)
    return pair


def cached(home: Path, repo: str) -> set[str]:
    """The files of a repository that lie in the Hub's cache."""
    (snapshot,) = home.glob(f"**/models--{repo.replace('/', '--')}/snapshots/*")
    return {p.relative_to(snapshot).as_posix() for p in snapshot.rglob("*") if p.is_file()}


@pytest.mark.parametrize("options", [(), ("--stream",)], ids=["", "stream"])
def test_the_output_is_that_of_the_same_folders_on_this_disk(
    options: tuple[str, ...],
    hub: HubServer,
    pair: c.Pair,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "out"
    dry = run(*COMMAND, *options, "-o", str(out), "--dry-run")
    result = run(*COMMAND, *options, "-o", str(out))
    assert (dry.code, result.code) == (0, 0), result
    for said in (dry.stderr, result.stderr):
        assert "[left_out]: Left out of the mllm's folder (8 files" in said
        assert "[carried]: Weights of others" in said
    local = ["drift-merge", "linear", *pair.arguments, "-o", str(tmp_path / "local")]
    assert run(*local).code == 0
    expected, found = c.read_files(tmp_path / "local"), c.read_files(out)
    assert found.keys() == expected.keys() > OTHERS.keys()
    described = {"README.md", "drift_merge.json"}  # name the sources as they were given
    assert {n: found[n] for n in expected.keys() - described} == {
        n: expected[n] for n in expected.keys() - described
    }
    manifests = [json.loads(files["drift_merge.json"]) for files in (expected, found)]
    assert manifests[0]["left_out"] == manifests[1]["left_out"]
    assert manifests[0]["sidecars"] == manifests[1]["sidecars"]
    # Left out is not fetched, and of a reasoner nothing that only an output would carry.
    home = tmp_path / "home"
    assert not cached(home, MLLM) & LEFT.keys()
    assert OTHERS.keys() <= cached(home, MLLM)
    weights = {name for name in OTHERS if not name.endswith(".json")}
    assert not cached(home, REASONER) & (weights | LEFT.keys())
    # Offline the same files are carried; what was left on the Hub nobody can know.
    if not options:
        go_offline(monkeypatch)
        assert run(*COMMAND, "-o", str(tmp_path / "offline")).code == 0
        offline = c.read_files(tmp_path / "offline")
        assert offline.keys() == found.keys()
