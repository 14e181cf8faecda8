"""Rounds on this disk: kills, failing calls, changing inputs, races, clocks, limits, ranks."""

import errno
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.benchmarks.soaking.world import COMMANDS, MAIN, ROOT, Soak
from tests.checkpoints import Pair, read_files
from tests.faults.forks import CHANGES, run_ranks

WRITE_ERRORS = (errno.ENOSPC, errno.EIO, errno.EROFS, errno.EDQUOT)


def kills(soak: Soak, chance: random.Random) -> None:
    """kill -9 at a call that changes the disk; workers are processes every other time."""
    name = chance.choice(list(COMMANDS))
    outs = soak.outs(chance)
    processes = {"process_bytes": 0} if chance.random() < 0.5 else {}
    last = soak.calls[name]
    struck = [
        soak.request(name, out, count=CHANGES, at=chance.randint(1, last), do="kill", **processes)
        for out in outs
    ]
    soak.finish("kill -9", name, outs, soak.forks.run_all(struck), {-9, 0})


def faults(soak: Soak, chance: random.Random) -> None:
    """One write, flush or read that fails or is short, once or from then on."""
    name = chance.choice(list(COMMANDS))
    outs = soak.outs(chance)
    calls = chance.choice(["write", "sync", "read"])
    struck, what = [], []
    for out in outs:
        do: int | str = errno.EIO if calls == "read" else chance.choice(WRITE_ERRORS)
        if calls != "sync" and chance.random() < 0.3:
            do = chance.choice(["short", "end"]) if calls == "read" else "short"
        under = out.parent if calls != "read" else soak.pair.mllm.parent
        faulty = {"FAULT_UNDER": str(under), "FAULT_CALLS": calls, "FAULT_DO": str(do)}
        faulty["FAULT_AT"] = str(chance.randint(1, 120 if calls != "sync" else 20))
        faulty |= {"FAULT_ALWAYS": "1"} if chance.random() < 0.3 else {}
        struck.append(soak.request(name, out, environment=faulty))
        what.append(faulty)
    runs = soak.forks.run_all(struck)
    soak.counts[f"{calls} fails or is short: met"] += sum(run.code != 0 for run in runs)
    soak.finish(f"{calls} fails or is short", name, outs, runs, {0, 5, 6})


def changing(soak: Soak, chance: random.Random) -> None:
    """An input is cut in half, replaced or written to at a read of it: refused, and named."""
    name = chance.choice(list(COMMANDS))
    outs = soak.outs(chance)
    struck = []
    for out in outs:
        pair = Pair(*(out.parent / f"{out.name}-{role}" for role in ("reasoner", "mllm")))
        shutil.copytree(soak.pair.reasoner, pair.reasoner)
        shutil.copytree(soak.pair.mllm, pair.mllm)
        under = str(chance.choice(pair) / "model")
        do = chance.choice(["shrink", "replace", "touch"])
        faulty = {"FAULT_UNDER": under, "FAULT_CALLS": "read", "FAULT_DO": do}
        faulty["FAULT_AT"] = str(chance.randint(3, 40))
        struck.append(soak.request(name, out, pair, environment=faulty))
    for out, run, request in zip(outs, soak.forks.run_all(struck), struck, strict=True):
        is_right = run.code in (5, 6) and ".safetensors" in run.stderr and not _weights(out)
        if run.code == 0:  # struck after the last read, or before the first header
            del request["environment"]
            again = Path(f"{out}-again")
            words = [str(again) if word == str(out) else word for word in request["arguments"]]
            soak.forks.run_all([{**request, "arguments": words}])
            old = {n: d for n, d in soak.whole[name].items() if n.endswith(".safetensors")}
            is_right = _weights(out) in (old, _weights(again))
        soak.check("input changes", soak.is_clean(run) and is_right, name, run)
        soak.counts["input changes"] += 1
        soak.counts["input changes: refused"] += run.code != 0
    shutil.rmtree(outs[0].parent)


def races(soak: Soak, chance: random.Random) -> None:
    """Eight processes want one OUT."""
    name = chance.choice(list(COMMANDS))
    out = soak.outs(chance)[0]
    runs = soak.forks.run_all([soak.request(name, out)] * 8)
    soak.check("race of 8", all(run.code in (0, 6) and soak.is_clean(run) for run in runs), runs)
    soak.check("race of 8", any(run.code == 0 for run in runs), "nobody won", runs)
    soak.check("race of 8", read_files(out) == soak.whole[name], "not whole")
    soak.check("race of 8", [p.name for p in out.parent.iterdir()] == [out.name], "left over")
    soak.counts["race of 8"] += 1
    shutil.rmtree(out.parent)


def clocks(soak: Soak, chance: random.Random) -> None:
    """The wall clock goes back all the time."""
    name = chance.choice(list(COMMANDS))
    outs = soak.outs(chance)
    back = {"environment": {"FAULT_CLOCK": str(chance.choice([1, 60, 86400]))}}
    runs = soak.forks.run_all([soak.request(name, out, **back) for out in outs])
    soak.finish("clock goes back", name, outs, runs, {0})


def limits(soak: Soak, chance: random.Random) -> None:
    """64 open files, a stack of 96 KiB (Python does not start with 64, LAPACK needs more)."""
    name = chance.choice(list(COMMANDS))
    out = soak.outs(chance)[0]
    words = soak.request(name, out)["arguments"]
    limit = f'ulimit -n 64 -s {512 if name == "tsv-m" else 96}; exec "$@"'
    line = ["bash", "-c", limit, "bash", sys.executable, "-c", MAIN]
    found = subprocess.run(
        [*line, *words],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    soak.check("64 files, a small stack", found.returncode == 0, name, found.stderr[-800:])
    soak.check("64 files, a small stack", soak.is_whole(name, out) is True, name, "not whole")
    soak.counts["64 files, a small stack"] += 1
    shutil.rmtree(out.parent)


def ranks(soak: Soak, chance: random.Random) -> None:
    """One of several ranks is killed, or its disk is full; another number of ranks goes on."""
    name = chance.choice([n for n in COMMANDS if n != "sweep"])
    out = soak.outs(chance)[0]
    last = soak.calls[name] // 2
    # From the second on: at the first it has not met the others, who wait five minutes for it where
    # no torchrun ends them.
    blow: dict[str, Any] = {"count": CHANGES, "at": chance.randint(2, last), "do": "kill"}
    if chance.random() < 0.3:
        blow |= {"do": errno.ENOSPC, "count": ("pwrite", "write"), "always": True}
    size = chance.randint(2, 4)
    victim = chance.randrange(size)
    arguments = soak.request(name, out)["arguments"]
    runs = run_ranks(soak.forks, size, arguments, {victim: blow})
    told = "".join(run.stderr for run in runs)
    codes = {run.code for number, run in enumerate(runs) if number != victim}
    soak.check("rank struck", len(codes) == 1 and codes <= {0, 6, 70}, runs)
    soak.check("rank struck", "Traceback" not in told and "a bug" not in told, runs)
    soak.check("rank struck", 0 in codes or f"rank {victim}" in told or codes == {6}, runs)
    soak.check("rank struck", soak.is_whole(name, out) is not False, runs)
    if not out.exists():
        runs = run_ranks(soak.forks, chance.randint(1, 4), arguments)
        soak.check("rank struck", {run.code for run in runs} == {0}, "rerun", runs)
        soak.check("rank struck", read_files(out) == soak.whole[name], "rerun differs")
        soak.counts["rank struck: resumed"] += 1
    soak.counts["rank struck"] += 1
    shutil.rmtree(out.parent)


def _weights(out: Path) -> dict[str, bytes]:
    """Of outputs that are there, not of what is under way."""
    files = read_files(out).items()
    return {n: d for n, d in files if n.endswith(".safetensors") and ".partial/" not in n}
