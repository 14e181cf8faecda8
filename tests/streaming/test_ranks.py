"""`--stream` on several ranks of one host: each fetches what its tensors need, within one limit."""

from pathlib import Path

import pytest

from tests import checkpoints as c
from tests.faults.forks import Forks, run_ranks
from tests.faults.harness import run
from tests.hub_server.client import environment
from tests.hub_server.models import shard_bytes
from tests.hub_server.server import HubServer
from tests.streaming.runs import COMMANDS, DiskWatch

RANKS = 3


@pytest.mark.slow
def test_each_rank_fetches_what_it_needs_and_the_limit_is_the_hosts(
    hub: HubServer, large: c.Pair, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    total = shard_bytes(large.reasoner) + shard_bytes(large.mllm)
    largest = max(p.stat().st_size for side in large for p in side.glob("*.safetensors"))
    limit = int(2.5 * largest) * RANKS
    hub.bytes_per_second = 40e6
    forks = Forks(environment(hub, tmp_path / "home") | {"HF_TOKEN": ""})
    try:
        words = [*COMMANDS["linear"], "-o", str(out), "--threads", "1", "--stream"]
        with DiskWatch(tmp_path / "out.partial" / "shards") as watch:
            runs = run_ranks(forks, RANKS, [*words, "--cache-limit", str(limit)])
    finally:
        forks.close()
    assert [each.code for each in runs] == [0] * RANKS, runs
    sent = sum(x.bytes_sent for x in hub.requests("GET /lfs/"))
    # Of what lies across the end of a rank's share two ranks take the shard; nobody takes all.
    assert total <= sent < 1.7 * total
    assert limit / 5 < watch.peak_bytes <= limit + 200_000  # folders, locks, notes
    assert not list((tmp_path / "home").rglob("*.safetensors"))
    hub.bytes_per_second = 0
    assert run(*COMMANDS["linear"], "-o", str(tmp_path / "plain")).code == 0
    assert c.read_files(out) == c.read_files(tmp_path / "plain")
