"""`--stream` from a real HTTP server on loopback: every command, the same bytes."""

import json
import re
from pathlib import Path

import pytest

from drift_merge.engine import workers
from drift_merge.storage.hub import ranges
from drift_merge.storage.loans import leases
from tests import checkpoints as c
from tests.adapters import write_adapter
from tests.faults.harness import run
from tests.hub_server.client import connected
from tests.hub_server.models import (
    MLLM,
    REASONER,
    downloads,
    shard_bytes,
)
from tests.hub_server.repo import sha256
from tests.hub_server.server import HubServer
from tests.streaming.runs import COMMANDS, least_limit, stream, succeed

# The others take half a minute and go the ways of these: pytest -m slow
_USUAL = ("compute", "linear", "two walks before")


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[] if n in _USUAL else pytest.mark.slow) for n in COMMANDS],
)
def test_streamed_outputs_have_the_bytes_of_others_at_any_limit(
    name: str, hub: HubServer, pair: c.Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = COMMANDS[name]
    least = least_limit(command, tmp_path / "out")
    assert downloads(hub) == []
    free = succeed(command, tmp_path / "free")
    tight = succeed(command, tmp_path / "tight", "--cache-limit", str(least))
    assert tight["peak_bytes"] <= least
    assert free["again_bytes"] == 0
    assert len(set(downloads(hub))) == free["num_downloads"]
    assert len(downloads(hub)) == free["num_downloads"] + tight["num_downloads"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(leases, "WORTH_PARTING_BYTES", 0)
        patch.setattr(ranges, "GAP_BYTES", 0)
        succeed(command, tmp_path / "parts")
    assert run(*command, "-o", str(tmp_path / "plain")).code == 0
    whole = c.read_files(tmp_path / "plain")
    for each in ("free", "tight", "parts"):
        assert c.read_files(tmp_path / each) == whole, each


@pytest.mark.parametrize("name", ["compute", "two walks before"])
def test_worker_processes_give_the_same_bytes(
    name: str, hub: HubServer, pair: c.Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "PROCESS_BYTES", 0)
    limit = str(least_limit(COMMANDS[name], tmp_path / "out"))
    traffic = succeed(COMMANDS[name], tmp_path / "out", "--cache-limit", limit)
    assert traffic["num_downloads"] > 5
    assert run(*COMMANDS[name], "-o", str(tmp_path / "plain")).code == 0
    assert c.read_files(tmp_path / "out") == c.read_files(tmp_path / "plain")


def test_only_shards_that_hold_something_selected_are_fetched(
    hub: HubServer, pair: c.Pair, tmp_path: Path
) -> None:
    traffic = succeed([*COMMANDS["compute"], "--layers", "0"], tmp_path / "out")
    needed = [
        path
        for side in pair
        for path in side.glob("*.safetensors")
        if any(re.search(r"layers\.0\.(self_attn|mlp)", name) for name in c.read_shard(path))
    ]
    assert len(needed) < 7
    assert sorted(downloads(hub)) == sorted(map(sha256, needed))
    assert traffic["num_downloads"] == len(needed)
    assert traffic["downloaded_bytes"] == sum(path.stat().st_size for path in needed)


def test_little_of_a_shard_is_fetched_by_ranges_of_that(
    hub: HubServer, pair: c.Pair, tmp_path: Path, in_parts: None
) -> None:
    traffic = succeed(
        ["drift-prior", "compute", REASONER, MLLM, "--modules", "attn"], tmp_path / "o"
    )
    read = sum(
        len(tensor.data)
        for side in pair
        for name, tensor in c.read_tensors(side).items()
        if "self_attn" in name and not name.startswith("visual")
    )
    assert traffic["num_parts"] > 3
    assert read <= traffic["downloaded_bytes"] < 1.2 * read
    assert traffic["downloaded_bytes"] < (shard_bytes(pair.reasoner) + shard_bytes(pair.mllm)) / 2


def test_a_local_reasoner_and_a_hub_mllm_go_together(
    hub: HubServer, pair: c.Pair, tmp_path: Path
) -> None:
    for sources, side in (
        ([str(pair.reasoner), MLLM], pair.mllm),
        ([REASONER, str(pair.mllm)], pair.reasoner),
    ):
        name = f"out-{side.name}"
        traffic = succeed(["drift-merge", "linear", *sources], tmp_path / name)
        # Of the reasoner the embedding and the head are not needed, which have no shard alone.
        assert traffic["downloaded_bytes"] == shard_bytes(side)
        assert run("drift-merge", "linear", *sources, "-o", str(tmp_path / f"{name}2")).code == 0
        assert c.read_files(tmp_path / name) == c.read_files(tmp_path / f"{name}2")


def test_with_local_models_stream_changes_nothing(pair: c.Pair, tmp_path: Path) -> None:
    assert succeed(["drift-merge", "linear", *pair.arguments], tmp_path / "out") == {}
    run("drift-merge", "linear", *pair.arguments, "-o", str(tmp_path / "plain"))
    assert c.read_files(tmp_path / "out") == c.read_files(tmp_path / "plain")


def test_an_adapter_on_a_hub_base_is_streamed(hub: HubServer, pair: c.Pair, tmp_path: Path) -> None:
    modules = {"model.layers.0.self_attn.o_proj": (c.HIDDEN, c.HIDDEN)}
    write_adapter(tmp_path / "lora", pair.reasoner, modules)
    config = json.loads((tmp_path / "lora/adapter_config.json").read_text())
    config["base_model_name_or_path"] = REASONER
    (tmp_path / "lora/adapter_config.json").write_text(json.dumps(config))
    command = ["drift-merge", "linear", str(tmp_path / "lora"), MLLM]
    dry = stream(command, tmp_path / "out", "-n", "--json")
    assert json.loads(dry.stdout)["download_shards"] == 7
    assert downloads(hub) == []
    assert succeed(command, tmp_path / "out")["num_downloads"] == 7
    assert run(*command, "-o", str(tmp_path / "plain")).code == 0
    assert c.read_tensors(tmp_path / "out") == c.read_tensors(tmp_path / "plain")


def test_a_sweep_and_an_applied_prior_are_streamed(
    hub: HubServer, pair: c.Pair, tmp_path: Path
) -> None:
    (tmp_path / "recipe.yaml").write_text(f"method: linear\nreasoner: {REASONER}\nmllm: {MLLM}\n")
    sweep = ["drift-merge", "sweep", str(tmp_path / "recipe.yaml"), "--set", "weight=0,0.1,0.4"]
    budget = stream(sweep, tmp_path / "sweep", "--budget", "--json")
    assert json.loads(budget.stdout)["download_shards"] == 7
    assert succeed(sweep, tmp_path / "sweep")["num_downloads"] == 7
    assert run(*sweep, "-o", str(tmp_path / "plain")).code == 0
    assert c.read_files(tmp_path / "sweep") == c.read_files(tmp_path / "plain")
    prior = tmp_path / "prior"
    assert run(*COMMANDS["compute"], "-o", str(prior)).code == 0
    apply = ["drift-prior", "apply", str(prior), MLLM]
    assert run(*apply, "-o", str(tmp_path / "applied")).code == 0
    with pytest.MonkeyPatch.context() as patch, connected(hub, tmp_path / "other home", patch):
        assert succeed(apply, tmp_path / "streamed")["num_downloads"] == 4
    assert c.read_files(tmp_path / "applied") == c.read_files(tmp_path / "streamed")


def test_a_recipe_says_to_stream_and_a_manifest_is_made_again_streamed(
    hub: HubServer, pair: c.Pair, tmp_path: Path
) -> None:
    recipe = f"method: linear\nreasoner: {REASONER}\nmllm: {MLLM}\nstream: true\ncache-limit: 1MB\n"
    (tmp_path / "recipe.yaml").write_text(recipe)
    first = run("drift-merge", "run", str(tmp_path / "recipe.yaml"), "-o", str(tmp_path / "out"))
    assert first.code == 0, first
    assert "Downloaded " in first.stderr
    assert succeed(["drift-merge", "run", str(tmp_path / "out")], tmp_path / "again")
    assert c.read_tensors(tmp_path / "out") == c.read_tensors(tmp_path / "again")
    printed = stream(
        [*COMMANDS["linear"], "--print-config"], tmp_path / "o", "--cache-limit", "9GB"
    )
    assert "stream: true\ncache-limit: 9GB\n" in printed.stdout


def test_python_streams_too(hub: HubServer, pair: c.Pair, tmp_path: Path) -> None:
    import drift_merge

    least = least_limit(COMMANDS["compute"], tmp_path / "prior")
    options = {"stream": True, "cache_limit": f"{least}B", "progress": False, "threads": 2}
    drift_merge.compute(REASONER, MLLM, tmp_path / "prior", **options)  # type: ignore[arg-type]
    drift_merge.linear([REASONER], MLLM, tmp_path / "merge", **options)  # type: ignore[arg-type]
    assert not list((tmp_path / "home").rglob("*.safetensors"))
    assert run(*COMMANDS["compute"], "-o", str(tmp_path / "plain")).code == 0
    assert c.read_files(tmp_path / "prior") == c.read_files(tmp_path / "plain")
