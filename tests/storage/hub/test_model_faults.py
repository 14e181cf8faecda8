"""Models of the Hub that are refused, cut, broken, or not there."""

import json
import os
from pathlib import Path

import pytest

from drift_merge.errors import CheckpointError, OutputError, SourceError
from drift_merge.storage.hub import faults
from drift_merge.storage.hub.models import fetch_headers, fetch_snapshot, resolve_revision
from drift_merge.storage.hub.ranges import open_range
from drift_merge.storage.sources import parse_source
from drift_merge.storage.weight_map import INDEX
from tests.hub_server.server import HubServer
from tests.storage.hub.models import REPO, SHARD_BYTES, SHARDS, single


def test_a_missing_model_says_that_both_readings_failed(hub: HubServer) -> None:
    for token in ("", "hf_x"):
        Path(os.environ["HF_HOME"]).mkdir(exist_ok=True)
        (Path(os.environ["HF_HOME"]) / "token").write_text(token)
        with pytest.raises(
            SourceError, match=r"org/typo is no path here, and .* no model org/typo"
        ):
            fetch_headers(parse_source("org/typo"))


def test_a_missing_revision_is_named(hub: HubServer, sharded: Path) -> None:
    for revision in ("v9", "b" * 40):
        with pytest.raises(SourceError, match=f"{REPO} has no revision '{revision}'"):
            fetch_snapshot(parse_source(f"{REPO}@{revision}"))


def test_a_gated_model_says_where_to_accept_its_terms(hub: HubServer, sharded: Path) -> None:
    hub.repos[REPO].gated = True
    with pytest.raises(SourceError, match="gated") as caught:
        resolve_revision(parse_source(REPO))
    assert f"{hub.url}/{REPO}" in caught.value.remedy
    assert "hf auth login" in caught.value.remedy
    pinned = parse_source(f"{REPO}@{hub.repos[REPO].refs['main']}")
    for fetch in (fetch_headers, fetch_snapshot):
        with pytest.raises(SourceError, match="gated"):
            fetch(pinned)


def test_a_token_opens_a_private_model_and_stays_on_the_hub(
    hub: HubServer, sharded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.repos[REPO].private = True
    hub.tokens["hf_good"] = True
    with pytest.raises(SourceError, match="no model") as caught:
        fetch_headers(parse_source(REPO))
    assert "hf auth login" in caught.value.remedy
    monkeypatch.setenv("HF_TOKEN", "hf_good")
    fetch_headers(parse_source(REPO))
    assert all(not exchange.has_token for exchange in hub.requests() if exchange.origin == "cdn")


@pytest.mark.parametrize(
    ("status", "message", "remedy"),
    [
        (401, "HTTP 401", "hf auth login"),
        (403, "HTTP 403", "hf auth login"),
        (404, "HTTP 404", "tree/"),
        (429, "HTTP 429", "Wait"),
        (500, "HTTP 500", "try again"),
        (503, "HTTP 503", "try again"),
    ],
)
@pytest.mark.parametrize("where", ["/api/models/org/name", "GET /lfs/"])
def test_every_refusal_has_a_message_and_a_remedy(
    hub: HubServer, sharded: Path, where: str, status: int, message: str, remedy: str
) -> None:
    hub.inject(where, status=status)
    with pytest.raises(SourceError, match=message) as caught:
        fetch_headers(parse_source(REPO))
    assert caught.value.exit_code == 3
    assert remedy in caught.value.remedy


@pytest.mark.parametrize("where", ["/api/models/org/name", "HEAD .*config.json", "GET /lfs/"])
def test_a_fault_that_passes_is_waited_out(hub: HubServer, sharded: Path, where: str) -> None:
    hub.inject(where, status=503, times=2)
    assert fetch_headers(parse_source(REPO)).shards.keys() == set(SHARDS)


def test_the_wait_that_the_hub_asks_for_is_kept(
    hub: HubServer, sharded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []
    monkeypatch.setattr(faults.time, "sleep", waits.append)
    hub.inject("/api/models/org/name", status=429, times=2, headers={"Retry-After": "7"})
    resolve_revision(parse_source(REPO))
    assert waits == [7.0, 7.0]


def test_a_hub_that_does_not_answer_is_given_up_with_a_remedy(
    hub: HubServer, sharded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DOWNLOAD_TIMEOUT", 0.2)
    hub.inject("/api/models/org/name", delay_seconds=20)
    with pytest.raises(SourceError, match="did not answer in time") as caught:
        resolve_revision(parse_source(REPO))
    assert "HF_HUB_DOWNLOAD_TIMEOUT" in caught.value.remedy


def test_a_network_that_is_down_is_said_so(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(SourceError, match=r"from http://127.0.0.1:1 failed") as caught:
        fetch_snapshot(parse_source(REPO))
    assert "HF_HUB_OFFLINE=1" in caught.value.remedy


def test_an_answer_that_is_not_the_hubs_is_said_so(hub: HubServer, sharded: Path) -> None:
    hub.inject("/api/models/org/name", body=b"<html>Please log in to this WLAN</html>")
    with pytest.raises(SourceError, match="JSON"):
        resolve_revision(parse_source(REPO))


def test_a_connection_cut_while_a_header_arrives_is_tried_again(
    hub: HubServer, sharded: Path
) -> None:
    hub.inject("GET /lfs/", cut_after=100, times=2)
    assert fetch_headers(parse_source(REPO)).shards.keys() == set(SHARDS)


def test_a_download_that_is_cut_resumes_and_gives_the_same_bytes(
    hub: HubServer, tmp_path: Path
) -> None:
    path = single(hub, tmp_path / "m", ["a"])
    hub.inject("GET /lfs/", cut_after=1_500_000, times=1)
    directory = fetch_snapshot(parse_source(REPO), quiet=True).path
    assert (directory / path.name).read_bytes() == path.read_bytes()


def test_a_snapshot_that_failed_is_completed_by_the_same_call(
    hub: HubServer, sharded: Path
) -> None:
    fault = hub.inject(f"HEAD .*{SHARDS[1]}", status=403)  # 500 would be retried for long
    with pytest.raises(SourceError, match="HTTP 403"):
        fetch_snapshot(parse_source(REPO), quiet=True)
    fault.times = 0
    hub.forget_requests()
    directory = fetch_snapshot(parse_source(REPO), quiet=True).path
    assert (directory / SHARDS[1]).read_bytes() == (sharded / SHARDS[1]).read_bytes()
    assert hub.bytes_sent("GET /lfs/") < 1.5 * SHARD_BYTES


def test_a_cached_shard_of_the_wrong_size_is_named(hub: HubServer, sharded: Path) -> None:
    directory = fetch_snapshot(parse_source(REPO), quiet=True).path
    os.truncate(directory / SHARDS[0], 1000)
    with pytest.raises(SourceError, match=f"{SHARDS[0]} .* has 1,000 bytes in the cache") as caught:
        fetch_snapshot(parse_source(REPO), quiet=True)
    assert "--force-download" in caught.value.remedy


def test_a_cache_that_cannot_be_written_is_an_output_error(hub: HubServer, sharded: Path) -> None:
    Path(os.environ["HF_HOME"]).touch()  # a file where the cache's directory should be
    with pytest.raises(OutputError, match="cache cannot be written") as caught:
        fetch_snapshot(parse_source(REPO), quiet=True)
    assert "HF_HOME" in caught.value.remedy


@pytest.mark.parametrize("fetch", [fetch_headers, fetch_snapshot])
@pytest.mark.parametrize("shard", ["../../evil.safetensors", "/etc/evil.safetensors"])
def test_an_index_that_leaves_the_repository_is_refused(
    hub: HubServer, sharded: Path, fetch: object, shard: str
) -> None:
    (sharded / INDEX).write_text(json.dumps({"weight_map": {"a": shard}}))
    with pytest.raises(CheckpointError, match="not a plain path below") as caught:
        fetch(parse_source(REPO))  # type: ignore[operator]
    assert caught.value.exit_code == 5
    assert hub.requests("evil|/lfs/") == []


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (INDEX, '{"weight_map": {"a": "absent.safetensors"}}', "names 1 missing shard"),
        (INDEX, json.dumps({"weight_map": {"ghost": SHARDS[0]}}), "ghost is in .* but it is not"),
        (INDEX, "not json", "index.json is not JSON"),
        ("config.json", "not json", "config.json is not JSON"),
        ("config.json", "[]", "not a JSON object"),
        (SHARDS[0], "", "0 bytes"),
        (SHARDS[0], "~" * 100, "claims a header of"),
    ],
)
def test_a_broken_repository_is_refused_by_name(
    hub: HubServer, sharded: Path, name: str, content: str, message: str
) -> None:
    (sharded / name).write_text(content)
    hub.add_commit(REPO, sharded)
    with pytest.raises(CheckpointError, match=message) as caught:
        fetch_headers(parse_source(REPO))
    assert caught.value.remedy


def test_a_repository_of_pickles_is_refused_with_the_way_to_convert_it(
    hub: HubServer, tmp_path: Path
) -> None:
    folder = tmp_path / "m"
    folder.mkdir()
    for name in ("config.json", "pytorch_model-1.bin", "pytorch_model-2.bin"):
        (folder / name).write_text("{}")
    hub.add_commit(REPO, folder)
    for fetch in (fetch_headers, fetch_snapshot):
        with pytest.raises(CheckpointError, match=r"pytorch_model-1\.bin") as caught:
            fetch(parse_source(REPO))
        assert f"hf download {REPO}" in caught.value.remedy
        assert "weights_only=True" in caught.value.remedy
    assert hub.requests(r"\.bin|/lfs/") == []


@pytest.mark.parametrize(
    ("client", "is_asked_again"), [("0.30.0", True), ("1.9.1", True), ("2.4.0", False)]
)
def test_a_bad_answer_is_asked_again_by_us_where_the_client_does_not_wait_itself(
    hub: HubServer,
    sharded: Path,
    monkeypatch: pytest.MonkeyPatch,
    client: str,
    is_asked_again: bool,
) -> None:
    source = resolve_revision(parse_source(REPO))
    monkeypatch.setattr(faults, "version", lambda _name: client)
    hub.inject("GET .*safetensors", status=503, times=1)

    def call() -> int:
        with open_range(source, SHARDS[0], 0, 8) as (response, _chunks):
            return int(response.status_code)

    if is_asked_again:
        assert faults.patiently(call, source, retry_answers=False) == 206
    else:
        with pytest.raises(SourceError, match="HTTP 503"):
            faults.patiently(call, source, retry_answers=False)
