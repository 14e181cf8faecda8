"""Faults of the Hub, of the line and of the disk during `--stream`."""

import json
from pathlib import Path

import pytest

from drift_merge.engine import workers
from drift_merge.storage.hub.faults import client_waits
from tests import checkpoints as c
from tests.faults.harness import assert_refusal, run
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
from tests.streaming.runs import COMMANDS, stream, succeed


def test_a_revision_that_moves_during_the_run_is_not_mixed_in(
    hub: HubServer, pair: c.Pair, tmp_path: Path
) -> None:
    other = make_layered_pair(
        tmp_path / "moved", reasoner=c.reasoner_tensors(4, seed=8), mllm=c.mllm_tensors(4, seed=9)
    )
    assert shard_bytes(other.mllm) == shard_bytes(pair.mllm)
    first = {repo: hub.repos[repo].refs["main"] for repo in (REASONER, MLLM)}
    real, moved = hub.begin_request, []

    def begin(request: str) -> object:
        if "tree" in request or "HEAD" in request:
            publish(hub, other)
            moved.append(request)
        return real(request)

    hub.begin_request = begin  # type: ignore[assignment, method-assign]
    pinned = [f"{REASONER}@{first[REASONER]}", f"{MLLM}@{first[MLLM]}"]
    # Both commits are named at the start; then both branches move at every request.
    succeed(["drift-merge", "linear", *pinned], tmp_path / "out")
    assert len(moved) > 7
    hub.begin_request = real  # type: ignore[method-assign]
    assert run("drift-merge", "linear", *pinned, "-o", str(tmp_path / "plain")).code == 0
    assert c.read_files(tmp_path / "out") == c.read_files(tmp_path / "plain")


@pytest.mark.parametrize(
    "fault",
    [
        {"match": whole_request(), "status": 503, "times": 5},
        {"match": "HEAD .*safetensors", "status": 500, "times": 5 if client_waits() else 2},
        {"match": "/tree/", "status": 502, "times": 2},
        {"match": "GET /lfs/", "cut_after": 5000, "times": 30},
        {"match": whole_request(), "cut_after": 0, "times": 9},
        {"match": whole_request(), "body": b"x", "times": 4},
        {"match": whole_request(), "delay_seconds": 2.5, "times": 1},
        {"match": "GET /lfs/", "bytes_per_second": 1e6},
    ],
    ids=lambda fault: "-".join(str(value) for value in fault.values()),
)
def test_faults_that_pass_change_no_byte(
    fault: dict[str, object], hub: HubServer, pair: c.Pair, tmp_path: Path
) -> None:
    hub.inject(**fault)  # type: ignore[arg-type]
    succeed(COMMANDS["linear"], tmp_path / "out")
    hub.faults.clear()
    assert run(*COMMANDS["linear"], "-o", str(tmp_path / "plain")).code == 0
    assert c.read_files(tmp_path / "out") == c.read_files(tmp_path / "plain")


def test_bytes_of_the_right_number_that_are_wrong_are_refused_and_not_kept(
    hub: HubServer, pair: c.Pair, tmp_path: Path
) -> None:
    last = max(pair.mllm.glob("*.safetensors"))
    hub.inject(whole_request(last), body=bytes(last.stat().st_size))
    result = stream(COMMANDS["linear"], tmp_path / "out")
    assert_refusal(result, 3, [last.name, MLLM, "wrong bytes", sha256(last)])
    assert not (tmp_path / "out").exists()
    kept = {path.name for path in (tmp_path / "out.partial/shards").rglob("*.safetensors")}
    assert last.name not in kept
    hub.faults.clear()
    hub.forget_requests()
    traffic = succeed(COMMANDS["linear"], tmp_path / "out")
    assert traffic["num_downloads"] < 7
    assert run(*COMMANDS["linear"], "-o", str(tmp_path / "plain")).code == 0
    assert c.read_files(tmp_path / "out") == c.read_files(tmp_path / "plain")


@pytest.mark.parametrize("process_bytes", [0, 2**62])
def test_a_hub_that_fails_for_good_is_a_source_error_and_the_rerun_resumes(
    process_bytes: int,
    hub: HubServer,
    pair: c.Pair,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    last = max(pair.mllm.glob("*.safetensors"))
    hub.inject(whole_request(last), status=503)
    monkeypatch.setattr(workers, "PROCESS_BYTES", process_bytes)
    result = stream(COMMANDS["linear"], tmp_path / "out")
    assert_refusal(result, 3, ["HTTP 503", "Finished parts are kept"])
    assert not (tmp_path / "out").exists()
    hub.faults.clear()
    hub.forget_requests()
    again = stream(COMMANDS["linear"], tmp_path / "out")
    assert again.code == 0, again
    assert "Resumed: " in again.stderr
    assert set(downloads(hub)) <= {sha256(path) for path in (last, max(pair.reasoner.glob("*.s*")))}
    assert run(*COMMANDS["linear"], "-o", str(tmp_path / "plain")).code == 0
    assert c.read_files(tmp_path / "out") == c.read_files(tmp_path / "plain")


def test_an_unfinished_streamed_run_is_finished_without_streaming_too(
    hub: HubServer, pair: c.Pair, tmp_path: Path
) -> None:
    last = max(pair.mllm.glob("*.safetensors"))
    hub.inject(whole_request(last), status=503)
    assert stream(COMMANDS["linear"], tmp_path / "out").code == 3
    hub.faults.clear()
    again = run(*COMMANDS["linear"], "-o", str(tmp_path / "out"))
    assert again.code == 0, again
    assert "Resumed: " in again.stderr
    assert not (tmp_path / "out.partial").exists()


def test_a_branch_that_moved_since_the_kill_is_another_plan(
    hub: HubServer, pair: c.Pair, tmp_path: Path
) -> None:
    last = max(pair.mllm.glob("*.safetensors"))
    fault = hub.inject(whole_request(last), status=503)
    assert stream(COMMANDS["linear"], tmp_path / "out").code == 3
    fault.times = 0
    hub.add_commit(MLLM, pair.mllm)
    result = stream(COMMANDS["linear"], tmp_path / "out")
    assert_refusal(result, 6, ["other inputs or options", "rm -r"])


def test_nan_in_a_streamed_input_is_refused_and_leaves_nothing(
    hub: HubServer, tmp_path: Path
) -> None:
    shape = c.text_shapes(4)["model.layers.3.mlp.up_proj.weight"]
    bad = {"model.layers.3.mlp.up_proj.weight": c.store([[float("nan")] * shape[1]] * shape[0])}
    publish(hub, make_layered_pair(tmp_path / "models", reasoner=bad))
    result = stream(COMMANDS["linear"], tmp_path / "out")
    assert_refusal(result, 5, ["NaN or Inf", "model.layers.3.mlp.up_proj.weight"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["home", "models"]


def test_a_disk_that_is_too_small_for_output_and_shards_is_found_before_the_work(
    hub: HubServer, pair: c.Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from drift_merge.engine import downloads as engine_downloads

    dry = json.loads(stream(COMMANDS["linear"], tmp_path / "out", "-n", "--json").stdout)
    monkeypatch.setattr(engine_downloads, "free_bytes", lambda _: dry["disk_bytes"] - 1)
    result = stream(COMMANDS["linear"], tmp_path / "out")
    output = dry["write_bytes"] + dry["carried_bytes"]
    mentions = [f"{output:,} bytes", f"{dry['cache_bytes']:,} for shards"]
    assert_refusal(result, 6, [*mentions, "--cache-limit"])
    assert downloads(hub) == []
    assert not (tmp_path / "out.partial").exists()
    monkeypatch.setattr(engine_downloads, "free_bytes", lambda _: dry["disk_bytes"])
    assert succeed(COMMANDS["linear"], tmp_path / "out")
