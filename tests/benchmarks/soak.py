"""Kills, faults, damage and races without end: nothing is lost, nothing wrong is told as done.

    python tests/benchmarks/soak.py --minutes 30 [--seed 0] [--state soak.json]

Rounds are numbered, and round n of a seed is always the same; the state file says which come next,
so that the same command goes on. A table comes at the end; exit 1 if anything was wrong. Needs gcc.
"""

import argparse
import errno
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from tests.checkpoints import SIDECARS, Pair, make_pair, read_files  # noqa: E402
from tests.faults.forks import CHANGES, Forks, Run, run_ranks  # noqa: E402
from tests.faults.harness import run as run_here  # noqa: E402

BATCH = 4
DOCUMENTED = {0, 1, 2, 3, 4, 5, 6, 130}
COMMANDS: dict[str, tuple[str, ...]] = {
    "compute": ("drift-prior", "compute"),
    "linear": ("drift-merge", "linear"),
    "slerp": ("drift-merge", "slerp"),
    "ties": ("drift-merge", "ties", "--trim", "global"),
}
WRITE_ERRORS = (errno.ENOSPC, errno.EIO, errno.EROFS, errno.EDQUOT)


class Soak:
    """The world of a soak: a pair, what undisturbed runs make of it, and what was found."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        library = folder / "faulty.so"
        source = Path(__file__).with_name("faulty.c")
        build = ["gcc", "-shared", "-fPIC", "-O1", "-o", str(library), str(source), "-ldl"]
        subprocess.run(build, check=True)
        self.forks = Forks({"LD_PRELOAD": str(library)})
        sidecars = {name: SIDECARS[name] for name in ("LICENSE", "remote/modeling_tiny.py")}
        self.pair = make_pair(folder / "pair", layers=1, num_shards=(1, 2), mllm_sidecars=sidecars)
        self.counts: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.whole = {name: self.undisturbed(name) for name in COMMANDS}

    def request(
        self, name: str, out: Path, pair: Pair | None = None, **more: Any
    ) -> dict[str, Any]:
        pair = pair or self.pair
        base = ["--base", str(self.pair.reasoner)] if name == "ties" else []
        words = [*COMMANDS[name], *pair.arguments, *base, "-o", str(out), "--threads", "2"]
        return {"arguments": words, "extent_bytes": 3000, **more}

    def undisturbed(self, name: str) -> dict[str, bytes]:
        out = self.folder / "whole" / name
        run = self.forks.run_all([self.request(name, out, count=CHANGES)])[0]
        assert run.code == 0, run
        self.counts[f"calls of {name}"] = len(run.calls)
        return read_files(out)

    def check(self, what: str, is_right: bool, *found: object) -> None:
        if not is_right:
            self.wrong.append(f"{what}: {' '.join(map(str, found))}"[:1500])

    def is_clean(self, run: Run) -> bool:
        told = run.stderr + run.stdout
        is_bug = "Traceback" in told or "this is a bug" in told
        return run.code in DOCUMENTED and not is_bug

    def finish(
        self, what: str, name: str, outs: list[Path], runs: list[Run], kinds: set[int]
    ) -> None:
        """After disturbed runs: clean ends, OUT absent or whole, and the rerun's bytes equal."""
        whole = self.whole[name]
        for out, run in zip(outs, runs, strict=True):
            self.check(what, run.code in kinds, name, "code", run.code, run.stderr[-600:])
            self.check(what, run.code == -9 or self.is_clean(run), name, "not clean", run)
            self.check(what, not out.exists() or read_files(out) == whole, name, "half-written")
            self.check(what, run.code != 0 or out.exists(), name, "exit 0 without an output")
        again = self.forks.run_all([self.request(name, out) for out in outs])
        for out, run in zip(outs, again, strict=True):
            # Killed after the last trace of who made it was removed: OUT is there, and whole.
            is_done = run.code == 0 or (run.code == 6 and "exists already" in run.stderr)
            self.check(what, is_done and read_files(out) == whole, name, "rerun", run)
            shutil.rmtree(out, ignore_errors=True)
            shutil.rmtree(out.with_name(out.name + ".partial"), ignore_errors=True)
        self.counts[what] += len(runs)

    def outs(self, chance: random.Random) -> list[Path]:
        folder = Path(tempfile.mkdtemp(dir=self.folder, prefix=f"r{chance.randrange(10**6)}-"))
        return [folder / f"out{number}" for number in range(BATCH)]


def kills(soak: Soak, chance: random.Random) -> None:
    """kill -9 at a call that changes the disk; workers are processes every other time."""
    name = chance.choice(list(COMMANDS))
    outs = soak.outs(chance)
    processes = {"process_bytes": 0} if chance.random() < 0.5 else {}
    last = soak.counts[f"calls of {name}"]
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
            do = "short"
        under = out.parent if calls != "read" else soak.pair.mllm.parent
        faulty = {"FAULT_UNDER": str(under), "FAULT_CALLS": calls, "FAULT_DO": str(do)}
        faulty["FAULT_AT"] = str(chance.randint(1, 120 if calls != "sync" else 20))
        faulty |= {"FAULT_ALWAYS": "1"} if chance.random() < 0.3 else {}
        struck.append(soak.request(name, out, environment=faulty))
        what.append(faulty)
    runs = soak.forks.run_all(struck)
    soak.counts["  of them met the fault"] += sum(run.code != 0 for run in runs)
    soak.finish(f"{calls} fails or is short", name, outs, runs, {0, 5, 6})


def shrinking(soak: Soak, chance: random.Random) -> None:
    """An input is cut in half at a read of it: refused, and named."""
    name = chance.choice(list(COMMANDS))
    outs = soak.outs(chance)
    struck = []
    for out in outs:
        pair = Pair(*(out.parent / f"{out.name}-{role}" for role in ("reasoner", "mllm")))
        shutil.copytree(soak.pair.reasoner, pair.reasoner)
        shutil.copytree(soak.pair.mllm, pair.mllm)
        under = str(chance.choice(pair) / "model")
        faulty = {"FAULT_UNDER": under, "FAULT_CALLS": "read", "FAULT_DO": "shrink"}
        faulty["FAULT_AT"] = str(chance.randint(3, 40))
        struck.append(soak.request(name, out, pair, environment=faulty))
    for out, run in zip(outs, soak.forks.run_all(struck), strict=True):
        is_refused = run.code in (5, 6) and ".safetensors" in run.stderr and not out.exists()
        is_late = run.code == 0 and out.exists()
        soak.check("input shrinks", soak.is_clean(run) and (is_refused or is_late), run)
        soak.counts["input shrinks"] += 1
        soak.counts["  of them refused"] += run.code != 0
    shutil.rmtree(outs[0].parent)


def damage(soak: Soak, chance: random.Random) -> None:
    """A byte, a number or a length of a header, index, config or tokenizer file is another one."""
    folder = soak.outs(chance)[0].parent
    shutil.copytree(soak.pair.mllm, folder / "mllm")
    files = sorted(p for p in (folder / "mllm").rglob("*") if p.suffix in (".json", ".safetensors"))
    for _ in range(60):
        path = chance.choice(files)
        before = path.read_bytes()
        path.write_bytes(mutated(before, chance, is_header=path.suffix == ".safetensors"))
        words = ["drift-prior", "align", str(soak.pair.reasoner), str(folder / "mllm")]
        if chance.random() < 0.3:
            words = ["drift-merge", "linear", *words[2:], "-o", str(folder / "out"), "--dry-run"]
        began = time.monotonic()
        found = run_here(*words)
        seconds = time.monotonic() - began
        soak.check("damaged input", seconds < 10, path.name, f"{seconds:.1f} s")
        soak.check("damaged input", soak.is_clean(Run(*found, [], [])), path.name, found)
        path.write_bytes(before)
        soak.counts["damaged input"] += 1
        soak.counts["  of them refused "] += found.code != 0
    shutil.rmtree(folder)


def mutated(data: bytes, chance: random.Random, *, is_header: bool) -> bytes:
    """One change at a random place; of a shard within its length and header."""
    end = min(len(data), 8 + int.from_bytes(data[:8], "little")) if is_header else len(data)
    at = chance.randrange(end)
    kind = chance.randrange(6)
    if kind == 0:
        return data[:at]
    if kind == 1:
        return data[:at] + bytes([chance.randrange(256)]) + data[at + 1 :]
    if kind == 2:
        return (
            data[:at] + chance.choice([b"9", b"-", b"]", b'"', b"{", b"null", b"1e999"]) + data[at:]
        )
    if kind == 3:
        return data[:at] + data[at + chance.randint(1, 16) :]
    if kind == 4:
        return data[:at] + data[at : at + chance.randint(1, 64)] * 2 + data[at:]
    digits = [i for i in range(end) if chr(data[i]).isdigit()]
    at = chance.choice(digits) if digits else at
    return data[:at] + str(chance.randrange(10**12)).encode() + data[at + 1 :]


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


def ranks(soak: Soak, chance: random.Random) -> None:
    """One of several ranks is killed, or its disk is full; another number of ranks goes on."""
    name = chance.choice(list(COMMANDS))
    out = soak.outs(chance)[0]
    last = soak.counts[f"calls of {name}"] // 2
    blow: dict[str, Any] = {"count": CHANGES, "at": chance.randint(1, last), "do": "kill"}
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
    soak.check("rank struck", not out.exists() or read_files(out) == soak.whole[name], runs)
    if not out.exists():
        runs = run_ranks(soak.forks, chance.randint(1, 4), arguments)
        soak.check("rank struck", {run.code for run in runs} == {0}, "rerun", runs)
        soak.check("rank struck", read_files(out) == soak.whole[name], "rerun differs")
        soak.counts["  of them resumed"] += 1
    soak.counts["rank struck"] += 1
    shutil.rmtree(out.parent)


ROUNDS: tuple[tuple[int, Callable[[Soak, random.Random], None]], ...] = (
    (8, kills),
    (8, faults),
    (3, shrinking),
    (4, damage),
    (1, races),
    (1, clocks),
    (4, ranks),
)


def main() -> int:
    """Rounds until the time is over, then a table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else "")
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--state", type=Path, default=Path("soak.json"))
    given = parser.parse_args()
    state = json.loads(given.state.read_text()) if given.state.exists() else {}
    state = state if state.get("seed") == given.seed else {"seed": given.seed}
    number, counts = state.get("next", 0), Counter(state.get("counts", {}))
    wrong = state.get("wrong", [])
    end = time.monotonic() + 60 * given.minutes
    kinds = [kind for weight, kind in ROUNDS for _ in range(weight)]
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        soak = Soak(Path(folder).resolve())
        known = set(soak.counts)
        while time.monotonic() < end:
            chance = random.Random(f"{given.seed}/{number}")
            kind = chance.choice(kinds)
            before = len(soak.wrong)
            kind(soak, chance)
            for text in soak.wrong[before:]:
                print(f"WRONG in round {number}: {text}", file=sys.stderr, flush=True)
            number += 1
            total = counts + Counter({k: v for k, v in soak.counts.items() if k not in known})
            found = {
                "seed": given.seed,
                "next": number,
                "counts": total,
                "wrong": wrong + soak.wrong,
            }
            given.state.write_text(json.dumps(found))
        soak.forks.close()
    for what, count in total.items():
        print(f"{count:8,}  {what}")
    print(f"{len(found['wrong']):8,}  wrong, in {number:,} rounds of seed {given.seed}")
    return 1 if found["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
