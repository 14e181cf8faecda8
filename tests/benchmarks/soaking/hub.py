"""Rounds with a Hub on the loopback interface: pushes and pulls that are killed, and races."""

import random
import shutil
import tempfile
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path

from tests.benchmarks.soaking.world import Soak
from tests.checkpoints import Pair, read_files
from tests.faults.forks import CHANGES, SENDS, Forks
from tests.hub.places import REPO, TOKEN
from tests.hub.pushed import World
from tests.hub_server.client import environment
from tests.hub_server.models import MLLM, REASONER, make_layered_pair, publish
from tests.hub_server.server import HubServer
from tests.hub_server.store import Account

_CALLS = (*CHANGES, *SENDS)


class Hub:
    """A Hub with a prior and a pair, and processes that know no other."""

    def __init__(self, soak: Soak) -> None:
        self.soak = soak
        self._stack = ExitStack()
        self.folder = Path(tempfile.mkdtemp(dir=soak.folder, prefix="hub-"))
        self.server = self._stack.enter_context(HubServer(self.folder / "store"))
        self.server.accounts[TOKEN] = Account("alice", orgs=("org",))
        token = {"HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0"}
        self.forks = Forks(environment(self.server, self.folder / "home") | token)
        self._stack.callback(self.forks.close)
        self.prior = self.folder / "prior"
        made = ["drift-prior", "compute", *soak.pair.arguments, "-o", str(self.prior)]
        assert self.forks.run(*made, "--max-shard-size", "1KB").code == 0
        self.world = World(self.server, self.forks, self.prior, range(0))
        whole = self.forks.run(*self.world.push("org/whole"), count=SENDS)
        assert whole.code == 0, whole
        assert self.forks.run(*self.world.push(REPO)).code == 0
        self.num_sent = len(whole.calls)
        run = self.forks.run(*self.pull(self.folder / "whole"), count=_CALLS)
        assert run.code == 0, run
        self.num_pulled, self.files = len(run.calls), read_files(self.folder / "whole")

    @cached_property
    def pair(self) -> Pair:
        """A pair of several shards, published."""
        pair = make_layered_pair(self.folder / "models")
        publish(self.server, pair)
        return pair

    def pull(self, out: Path) -> list[str]:
        """The command."""
        return ["drift-prior", "pull", REPO, "-q", "-o", str(out)]

    def close(self) -> None:
        """End the processes, then the server."""
        self._stack.close()


def push(soak: Soak, chance: random.Random) -> None:
    """kill -9 when a push is about to send something; the same command completes it."""
    hub = soak.make(Hub)
    repo_id = f"org/p{chance.randrange(10**9)}"
    hub.server.store.lfs.clear()
    at = chance.randint(1, hub.num_sent)
    killed = hub.forks.run(*hub.world.push(repo_id), count=SENDS, at=at, do="kill")
    soak.check("push killed", killed.code in (-9, 0), killed)
    done = hub.forks.run(*hub.world.push(repo_id))
    soak.check("push killed", done.code == 0, "rerun", done)
    try:
        hub.world.stage_of(repo_id, 0)
        hub.world.assert_whole(repo_id)
    except (AssertionError, KeyError) as error:
        soak.check("push killed", False, "not whole", repr(error))
    soak.counts["push killed"] += killed.code == -9
    hub.server.repos.pop(repo_id, None)


def pull(soak: Soak, chance: random.Random) -> None:
    """kill -9 at a call of a pull that changes the disk or sends."""
    hub = soak.make(Hub)
    outs = soak.outs(chance)
    struck = [
        {
            "arguments": hub.pull(out),
            "count": _CALLS,
            "at": chance.randint(1, hub.num_pulled),
            "do": "kill",
        }
        for out in outs
    ]
    runs = hub.forks.run_all(struck)
    soak.counts["pull killed"] += sum(run.code == -9 for run in runs)
    for out, run in zip(outs, runs, strict=True):
        soak.check("pull killed", run.code in (-9, 0), run)
        soak.check("pull killed", not out.exists() or read_files(out) == hub.files, "half-written")
    again = [out for out in outs if not out.exists()]
    runs = hub.forks.run_all([{"arguments": hub.pull(out)} for out in again]) if again else []
    for run in runs:
        soak.check("pull killed", run.code == 0, "rerun", run)
    for out in outs:
        soak.check("pull killed", out.exists() and read_files(out) == hub.files, "rerun differs")
    shutil.rmtree(outs[0].parent)


def races(soak: Soak, chance: random.Random) -> None:
    """Eight processes share one cache that holds half of what they need, or push to one place."""
    hub = soak.make(Hub)
    if chance.random() < 0.5:
        repo_id = f"org/r{chance.randrange(10**9)}"
        hub.server.store.lfs.clear()
        runs = hub.forks.run_all([{"arguments": hub.world.push(repo_id)}] * 8)
        soak.check("race of 8 pushes", all(run.code in (0, 6) for run in runs), runs)
        soak.check("race of 8 pushes", all(soak.is_clean(run) for run in runs), runs)
        if all(run.code for run in runs):  # each met the commit of another
            runs = [hub.forks.run(*hub.world.push(repo_id))]
        soak.check("race of 8 pushes", any(run.code == 0 for run in runs), "nobody won", runs)
        try:
            hub.world.assert_whole(repo_id)
        except AssertionError as error:
            soak.check("race of 8 pushes", False, "not whole", repr(error))
        soak.counts["race of 8 pushes"] += 1
        return
    assert hub.pair
    out = soak.outs(chance)[0].parent
    words = ["drift-merge", "linear", REASONER, MLLM, "--stream", "--threads", "1"]
    words += ["--cache-limit", "60KB", "-q", "-o"]
    runs = hub.forks.run_all([{"arguments": [*words, str(out / str(n))]} for n in range(8)])
    soak.check("race of 8 for a cache", all(run.code == 0 for run in runs), runs)
    found = [read_files(out / str(n)) for n in range(8) if (out / str(n)).exists()]
    soak.check("race of 8 for a cache", all(one == found[0] for one in found), "bytes differ")
    soak.counts["race of 8 for a cache"] += 1
    shutil.rmtree(out)
