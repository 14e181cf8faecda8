"""Against a real HTTP server on loopback, with the unmodified huggingface_hub client."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from drift_merge.errors import CheckpointError, OutputError, SourceError
from drift_merge.storage.headers import encode_header, read_header
from drift_merge.storage.hub import faults
from drift_merge.storage.hub.models import fetch_headers, fetch_snapshot, resolve_revision
from drift_merge.storage.sources import parse_source
from drift_merge.storage.weight_map import INDEX
from tests.hub_server.client import connected, environment, go_offline
from tests.hub_server.server import HubServer

SHARD_BYTES = 2_000_000
REPO = "org/name"
SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    monkeypatch.setattr(faults, "WAITS_SECONDS", (0.01, 0.02))
    with HubServer() as server, connected(server, tmp_path / "home", monkeypatch):
        yield server


@pytest.fixture
def sharded(hub: HubServer, tmp_path: Path) -> Path:
    """A repository of two shards with the files that real ones have beside them."""
    folder = tmp_path / "model"
    weight_map = {}
    for number, shard in enumerate(SHARDS):
        names = [f"layers.{number}.{part}.weight" for part in ("q", "k", "v", "o")]
        write_shard(folder / shard, names)
        weight_map |= dict.fromkeys(names, shard)
    sidecars = ["tokenizer.json", "code/modeling_x.py", "code/__init__.py", "chat_template.jinja"]
    others = ["pytorch_model.bin", "consolidated.safetensors", "original/params.json", "m.gguf"]
    for name in [*sidecars, *others, "README.md", ".gitattributes"]:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(f"this is {name}")
    (folder / "config.json").write_text('{"model_type": "x"}')
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    hub.add_commit(REPO, folder)
    return folder


def write_shard(path: Path, names: list[str], size: int = SHARD_BYTES) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    header, _ = encode_header([(name, "U8", (size // len(names),)) for name in names], {})
    path.write_bytes(header + os.urandom(size // len(names) * len(names)))


def single(hub: HubServer, folder: Path, names: list[str], repo_id: str = REPO) -> Path:
    write_shard(folder / "model.safetensors", names)
    (folder / "config.json").write_text("{}")
    hub.add_commit(repo_id, folder)
    return folder / "model.safetensors"


def test_a_revision_is_pinned_to_the_commit_of_its_branch_or_tag(
    hub: HubServer, sharded: Path
) -> None:
    first = hub.repos[REPO].refs["main"]
    hub.repos[REPO].refs |= {"v1": first, "refs/pr/1": first}
    second = hub.add_commit(REPO, sharded)
    assert resolve_revision(parse_source(REPO)).revision == second
    assert resolve_revision(parse_source(f"{REPO}@v1")).revision == first
    assert resolve_revision(parse_source(f"{REPO}@refs/pr/1")).revision == first
    pinned = resolve_revision(parse_source(f"{REPO}@main"))
    assert (pinned.given, pinned.label) == (f"{REPO}@main", f"{REPO}@{second[:8]}")


def test_local_and_pinned_sources_are_never_asked_about(hub: HubServer, tmp_path: Path) -> None:
    for text in (str(tmp_path), f"{REPO}@{'a' * 40}"):
        assert resolve_revision(parse_source(text)) == parse_source(text)
    assert hub.requests() == []


def test_headers_cost_kilobytes_and_equal_those_of_the_files(hub: HubServer, sharded: Path) -> None:
    headers = fetch_headers(parse_source(REPO))
    assert headers.config == {"model_type": "x"}
    assert headers.shards == {name: read_header(sharded / name, name) for name in SHARDS}
    assert hub.bytes_sent() < 20_000 < 2 * SHARD_BYTES
    assert len(hub.requests("GET /lfs/")) == 2
    assert all(exchange.range for exchange in hub.requests("GET /lfs/"))


def test_sidecars_are_the_files_that_are_not_weights(hub: HubServer, sharded: Path) -> None:
    assert list(fetch_headers(parse_source(REPO)).folder.carried) == [
        "README.md",
        "chat_template.jinja",
        "code/__init__.py",
        "code/modeling_x.py",
        "config.json",
        "tokenizer.json",
    ]


def test_a_header_longer_than_the_first_request_is_fetched_by_a_second(
    hub: HubServer, tmp_path: Path
) -> None:
    path = single(hub, tmp_path / "m", [f"layers.{i}.weight" + "x" * 50 for i in range(1000)])
    shards = fetch_headers(parse_source(REPO)).shards
    assert shards == {path.name: read_header(path, path.name)}
    assert len(hub.requests("GET /lfs/")) == 2
    assert hub.bytes_sent("GET /lfs/") < 200_000


def test_a_shard_smaller_than_the_first_request_is_read(hub: HubServer, tmp_path: Path) -> None:
    folder = tmp_path / "m"
    write_shard(folder / "model.safetensors", ["a"], size=10)
    (folder / "config.json").write_text("{}")
    hub.add_commit(REPO, folder)
    assert fetch_headers(parse_source(REPO)).shards["model.safetensors"].tensors.keys() == {"a"}


def test_a_mirror_that_ignores_ranges_is_not_read_to_the_end(
    hub: HubServer, tmp_path: Path
) -> None:
    path = single(hub, tmp_path / "m", [f"layers.{i}.weight" + "x" * 50 for i in range(1000)])
    hub.inject("GET /lfs/", ignore_range=True, bytes_per_second=2_000_000)
    assert fetch_headers(parse_source(REPO)).shards == {path.name: read_header(path, path.name)}


def test_a_snapshot_has_weights_and_sidecars_and_no_other_copies(
    hub: HubServer, sharded: Path
) -> None:
    directory = fetch_snapshot(parse_source(REPO), quiet=True).path
    found = sorted(p.relative_to(directory).as_posix() for p in directory.rglob("*") if p.is_file())
    sidecars = fetch_headers(parse_source(REPO)).folder.carried
    assert found == sorted([*SHARDS, INDEX, *sidecars])
    assert all((directory / name).read_bytes() == (sharded / name).read_bytes() for name in found)
    assert directory.name == hub.repos[REPO].refs["main"]


def test_headers_of_a_cached_snapshot_are_read_from_the_cache(
    hub: HubServer, sharded: Path
) -> None:
    fetch_snapshot(parse_source(REPO), quiet=True)
    hub.forget_requests()
    fetch_headers(parse_source(REPO))
    assert hub.requests("GET .*safetensors$|/lfs/") == []


def test_quiet_leaves_stderr_empty_and_the_setting_as_it_was(
    hub: HubServer, sharded: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from huggingface_hub.utils import are_progress_bars_disabled

    fetch_headers(parse_source(REPO))
    fetch_snapshot(parse_source(REPO), quiet=True)
    assert capfd.readouterr() == ("", "")
    assert not are_progress_bars_disabled()


def test_what_is_cached_works_offline(
    hub: HubServer, sharded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = resolve_revision(parse_source(REPO))
    directory = fetch_snapshot(source, quiet=True).path
    online = fetch_headers(source)
    go_offline(monkeypatch)
    hub.forget_requests()
    assert resolve_revision(parse_source(REPO)) == source
    assert fetch_snapshot(parse_source(REPO)).path == directory
    found = fetch_headers(parse_source(REPO))
    assert (found.config, found.shards) == (online.config, online.shards)
    assert found.folder.carried == online.folder.carried
    assert online.folder.left_out  # which offline nobody can know
    assert hub.requests() == []


@pytest.mark.parametrize("cached", ["nothing", "headers", "one shard"])
def test_what_is_not_cached_offline_names_the_variable(
    hub: HubServer, sharded: Path, monkeypatch: pytest.MonkeyPatch, cached: str
) -> None:
    if cached != "nothing":
        fetch_headers(parse_source(REPO))
    if cached == "one shard":
        (fetch_snapshot(parse_source(REPO), quiet=True).path / SHARDS[1]).unlink()
    go_offline(monkeypatch)
    for fetch in (fetch_headers, fetch_snapshot):
        with pytest.raises(SourceError, match="HF_HUB_OFFLINE") as caught:
            fetch(parse_source(REPO))
        assert caught.value.exit_code == 3
        assert f"HF_HUB_OFFLINE=0 hf download {REPO}" in caught.value.remedy


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


def test_a_subprocess_with_the_environment_alone_uses_the_server(
    hub: HubServer, sharded: Path, tmp_path: Path
) -> None:
    code = (
        "import sys; from drift_merge.storage.hub.models import fetch_headers as f; "
        "from drift_merge.storage.sources import parse_source as p; "
        f"print(len(f(p('{REPO}')).shards), 'torch' in sys.modules)"
    )
    env = {**os.environ, **environment(hub, tmp_path / "other_home"), "PYTHONWARNINGS": "error"}
    run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert (run.stdout, run.stderr) == ("2 False\n", "")
