"""What travels, and what lies on the disk: no more than must, never more than the limit."""

import json
import time
from pathlib import Path

import pytest

from drift_merge.storage import mapped
from tests import checkpoints as c
from tests.faults.harness import assert_refusal, run
from tests.hub_server.client import go_offline
from tests.hub_server.models import (
    MLLM,
    REASONER,
    downloads,
    shard_bytes,
)
from tests.hub_server.server import HubServer
from tests.streaming.runs import COMMANDS, DiskWatch, stream, succeed


def test_shards_in_the_users_cache_are_used_from_there_and_stay(
    hub: HubServer, pair: c.Pair, tmp_path: Path
) -> None:
    assert run(*COMMANDS["compute"], "-o", str(tmp_path / "plain")).code == 0
    cached = sorted(tmp_path.glob("home/**/snapshots/*/*.safetensors"))
    assert len(cached) == 7
    assert succeed(COMMANDS["compute"], tmp_path / "out") == {}
    cached[0].unlink()
    hub.forget_requests()
    assert succeed(COMMANDS["compute"], tmp_path / "out2")["num_downloads"] == 1
    assert sorted(tmp_path.glob("home/**/snapshots/*/*.safetensors")) == cached[1:]
    for name in ("out", "out2"):
        assert c.read_files(tmp_path / name) == c.read_files(tmp_path / "plain")


def test_what_is_cached_streams_offline_and_what_is_not_says_so(
    hub: HubServer, pair: c.Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(*COMMANDS["compute"], "-o", str(tmp_path / "plain")).code == 0
    go_offline(monkeypatch)
    hub.forget_requests()
    assert succeed(COMMANDS["compute"], tmp_path / "out") == {}
    next(tmp_path.glob("home/**/snapshots/*/*.safetensors")).unlink()
    assert_refusal(stream(COMMANDS["compute"], tmp_path / "o"), 3, ["HF_HUB_OFFLINE"])
    assert hub.requests() == []


@pytest.mark.parametrize("shards", [2.2, 4.0])
def test_the_disk_never_holds_more_than_the_limit_beside_the_output(
    shards: float, hub: HubServer, large: c.Pair, tmp_path: Path
) -> None:
    hub.bytes_per_second = 30e6
    limit = int(
        shards * max(p.stat().st_size for side in large for p in side.glob("*.safetensors"))
    )
    out = tmp_path / "out"
    with DiskWatch(tmp_path / "out.partial" / "shards") as watch:
        traffic = succeed(COMMANDS["linear"], out, "--cache-limit", str(limit))
    assert watch.num_looks > 50
    small = 200_000  # folders, locks and notes of huggingface_hub
    assert traffic["peak_bytes"] <= limit
    assert limit / 3 < watch.peak_bytes <= limit + small
    assert (traffic["num_downloads"], traffic["again_bytes"]) == (18, 0)
    assert len(downloads(hub)) == 18
    assert not list((tmp_path / "home").rglob("*.safetensors"))
    hub.bytes_per_second = 0
    assert run(*COMMANDS["linear"], "-o", str(tmp_path / "plain")).code == 0
    assert c.read_files(out) == c.read_files(tmp_path / "plain")


def test_downloads_go_on_while_work_is_done(
    hub: HubServer, large: c.Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the first tensors and the last ones most shards are asked for."""
    from drift_merge.engine import workers

    hub.bytes_per_second = 20e6
    moments: list[int] = []
    real = workers.run_bundle

    def noted(*arguments: object) -> object:
        moments.append(len(hub._log))
        return real(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(workers, "run_bundle", noted)
    succeed(COMMANDS["compute"], tmp_path / "out")
    assert moments[-1] - moments[len(moments) // 10] >= 10


def test_shards_are_unmapped_before_they_are_deleted(
    hub: HubServer, pair: c.Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dropped = []
    real = mapped.MappedCheckpoint.drop

    def drop(self: mapped.MappedCheckpoint, shard: str) -> None:
        found, file = self._maps.find(shard), self._files.find(shard)
        path = self._file(shard)
        assert path.exists()
        real(self, shard)
        assert found is None or found.closed, f"{shard} is still looked at"
        assert self._files.find(shard) is None
        if found is not None or file is not None:
            dropped.append(shard)

    monkeypatch.setattr(mapped.MappedCheckpoint, "drop", drop)
    for name in ("compute", "two walks before"):
        dropped.clear()
        traffic = succeed(COMMANDS[name], tmp_path / name)
        assert len(dropped) == traffic["num_downloads"]


def test_a_dry_run_says_what_would_travel_and_what_the_disk_must_hold(
    hub: HubServer, pair: c.Pair, tmp_path: Path
) -> None:
    text = stream(COMMANDS["linear"], tmp_path / "out", "-n", "--cache-limit", "20KB")
    total = shard_bytes(pair.reasoner) + shard_bytes(pair.mllm)
    assert f"Downloads {total / 1000:.1f} kB of 7 shard(s)\n" in text.stdout
    plan = json.loads(
        stream(COMMANDS["linear"], tmp_path / "o", "-n", "--json", "--cache-limit", "20KB").stdout
    )
    assert plan["download_bytes"] == total
    assert (plan["download_shards"], plan["download_again_bytes"]) == (7, 0)
    assert plan["cache_bytes"] == 20_000
    assert plan["disk_bytes"] == plan["write_bytes"] + plan["carried_bytes"] + 20_000
    assert f"Disk      {plan['disk_bytes'] / 1000:.1f} kB at the most" in text.stdout
    assert downloads(hub) == []
    assert not list((tmp_path / "home").rglob("*.safetensors"))
    assert run(*COMMANDS["linear"], "-o", str(tmp_path / "plain")).code == 0
    cached = stream(COMMANDS["linear"], tmp_path / "out", "-n")
    assert "Downloads nothing" in cached.stdout


def test_align_on_hub_ids_reads_kilobytes_of_gigabytes(hub: HubServer, large: c.Pair) -> None:
    started = time.monotonic()
    result = run("drift-prior", "align", REASONER, MLLM)
    assert result.code == 0, result
    assert "80 of 80 selected tensors matched" in result.stdout
    assert time.monotonic() - started < 10
    served = hub.bytes_sent()
    headers = sum(
        8 + int.from_bytes(path.read_bytes()[:8], "little")
        for side in large
        for path in side.glob("*.safetensors")
    )
    others = 60_000  # two indexes, two configs, two listings
    assert headers <= served < headers + others < (shard_bytes(large.mllm)) / 50
    assert downloads(hub) == []


def test_verify_fetches_only_what_its_sample_needs(
    hub: HubServer, large: c.Pair, tmp_path: Path, in_parts: None
) -> None:
    for program, flag, name in (
        ("drift-prior", "compute", "prior"),
        ("drift-merge", "linear", "merge"),
    ):
        out = tmp_path / name
        result = stream([program, flag, REASONER, MLLM], out)
        assert result.code == 0, result
        assert "Next: drift-" in result.stderr
        hub.forget_requests()
        sources = ["--reasoner", REASONER, "--mllm", MLLM]
        sample = ["--sample", "3", "--seed", "5", "--stream"]
        checked = run(program, "verify", str(out), *sources, *sample)
        assert "Computed again from the sources, equal: 3" in checked.stdout, checked
        assert hub.bytes_sent("GET /lfs/") < shard_bytes(large.mllm) / 3
        assert downloads(hub) == []
    limit = ["--cache-limit", "10"]
    refused = run("drift-prior", "verify", str(tmp_path / "prior"), *sources, *sample, *limit)
    assert_refusal(refused, 2, ["--cache-limit is 10 bytes"])
    assert not list((tmp_path / "home").rglob("*.safetensors"))


def test_a_revision_that_is_not_there_is_found_before_anything_is_fetched(
    hub: HubServer, pair: c.Pair, tmp_path: Path
) -> None:
    for command in (["drift-merge", "linear"], ["drift-merge", "compare"]):
        out = [] if command[-1] == "compare" else ["-o", str(tmp_path / "out")]
        result = run(*command, REASONER, f"{MLLM}@nowhere", "-q", *out)
        assert_refusal(result, 3, [f"{MLLM} has no revision 'nowhere'"])
        assert hub.bytes_sent(r"GET \S+\.safetensors|GET /lfs/") == 0
