"""Against a real HTTP server on loopback, with the unmodified huggingface_hub client."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from drift_merge.errors import SourceError
from drift_merge.storage.headers import read_header
from drift_merge.storage.hub.models import fetch_headers, fetch_snapshot, resolve_revision
from drift_merge.storage.sources import parse_source
from drift_merge.storage.weight_map import INDEX
from tests.hub_server.client import environment, go_offline
from tests.hub_server.server import HubServer
from tests.storage.hub.models import REPO, SHARD_BYTES, SHARDS, single, write_shard


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
