"""What all rounds of a soak share: inputs, what undisturbed runs make of them, what was found."""

import random
import shutil
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any, Protocol, TypeVar, cast

from tests.checkpoints import SIDECARS, Pair, make_pair, read_files
from tests.faults.forks import CHANGES, Forks, Run

ROOT = Path(__file__).parents[3]
MAIN = "import sys; from drift_merge.cli import merge, prior; sys.argv = sys.argv[1:]; " + (
    "(prior if sys.argv[0] == 'drift-prior' else merge).main()"
)
BATCH = 4
DOCUMENTED = {0, 1, 2, 3, 4, 5, 6, 7, 130}
COMMANDS: dict[str, tuple[str, ...]] = {
    "compute": ("drift-prior", "compute"),
    "linear": ("drift-merge", "linear"),
    "slerp": ("drift-merge", "slerp"),
    "ties": ("drift-merge", "ties", "--trim", "global"),
    "tsv-m": ("drift-merge", "tsv-m"),
    "sweep": ("drift-merge", "sweep"),
}
_WITH_BASE = ("ties", "tsv-m")


class Part(Protocol):
    """What only some rounds need."""

    def __init__(self, soak: "Soak") -> None:
        """Make it."""

    def close(self) -> None:
        """End its processes."""


Made = TypeVar("Made", bound=Part)


class Soak:
    """The world of a soak."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        library = folder / "faulty.so"
        source = Path(__file__).parents[1] / "faulty.c"
        build = ["gcc", "-shared", "-fPIC", "-O1", "-o", str(library), str(source), "-ldl"]
        subprocess.run(build, check=True)
        self.forks = Forks({"LD_PRELOAD": str(library)})
        sidecars = {name: SIDECARS[name] for name in ("LICENSE", "remote/modeling_tiny.py")}
        self.pair = make_pair(folder / "pair", layers=1, num_shards=(1, 2), mllm_sidecars=sidecars)
        self.counts: Counter[str] = Counter()
        self.calls: dict[str, int] = {}  # that change the disk, of an undisturbed run
        self.wrong: list[str] = []
        self._made: dict[type, Part] = {}
        self.whole = {name: self.undisturbed(name) for name in COMMANDS}

    def make(self, kind: type[Made]) -> Made:
        """What only some rounds need, made by the first."""
        if kind not in self._made:
            self._made[kind] = kind(self)
        return cast(Made, self._made[kind])

    def close(self) -> None:
        """End all processes."""
        for one in self._made.values():
            one.close()
        self.forks.close()

    def request(
        self, name: str, out: Path, pair: Pair | None = None, **more: Any
    ) -> dict[str, Any]:
        """A run of a command into `out`."""
        pair = pair or self.pair
        sources = list(pair.arguments)
        if name == "sweep":
            recipe = pair.mllm.with_name(f"{pair.mllm.name}.yaml")
            lines = ["method: linear", f"reasoner: {pair.reasoner}", f"mllm: {pair.mllm}"]
            recipe.write_text("\n".join(lines))
            sources = [str(recipe), "--set", "weight=0.1:0.2:0.1"]
        base = ["--base", str(self.pair.reasoner)] if name in _WITH_BASE else []
        words = [*COMMANDS[name], *sources, *base, "-o", str(out), "--threads", "2"]
        return {"arguments": words, "extent_bytes": 3000, **more}

    def undisturbed(self, name: str) -> dict[str, bytes]:
        """The files of an output that nobody disturbed."""
        out = self.folder / "whole" / name
        run = self.forks.run_all([self.request(name, out, count=CHANGES)])[0]
        assert run.code == 0, run
        self.calls[name] = len(run.calls)
        return read_files(out)

    def is_whole(self, name: str, out: Path) -> bool | None:
        """Whether an output is what it should be; None where there is none at all.

        Of a sweep, which makes several, each that is there must be whole.
        """
        if not out.exists():
            return None
        found, whole = read_files(out), self.whole[name]
        if name == "sweep":
            made = {path.name for path in out.iterdir() if not path.name.endswith(".partial")}
            found = {file: data for file, data in found.items() if file.split("/")[0] in made}
            expected = {file: data for file, data in whole.items() if file.split("/")[0] in made}
            return found == expected if found else None
        return found == whole

    def check(self, what: str, is_right: bool, *found: object) -> None:
        """Note what is wrong."""
        if not is_right:
            self.wrong.append(f"{what}: {' '.join(map(str, found))}"[:1500])

    def is_clean(self, run: Run) -> bool:
        """A documented code, no traceback."""
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
            self.check(what, self.is_whole(name, out) is not False, name, "half-written")
            self.check(what, run.code != 0 or out.exists(), name, "exit 0 without an output")
        again = self.forks.run_all([self.request(name, out) for out in outs])
        for out, run in zip(outs, again, strict=True):
            # Killed after the last trace of who made it was removed: OUT is there, and whole.
            is_done = run.code == 0 or (run.code == 6 and "exists already" in run.stderr)
            self.check(what, is_done and read_files(out) == whole, name, "rerun", run)
            shutil.rmtree(out, ignore_errors=True)
            shutil.rmtree(out.with_name(out.name + ".partial"), ignore_errors=True)
        self.counts[what] += len(runs)
        if what == "kill -9":  # the rest was over before the call at which it was to die
            self.counts[f"{what}: {name} died"] += sum(run.code == -9 for run in runs)

    def outs(self, chance: random.Random) -> list[Path]:
        """Places for outputs, in a folder of their own."""
        folder = Path(tempfile.mkdtemp(dir=self.folder, prefix=f"r{chance.randrange(10**6)}-"))
        return [folder / f"out{number}" for number in range(BATCH)]
