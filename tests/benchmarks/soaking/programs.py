"""Rounds of the commands that run other programs: training, and searching with an evaluation."""

import random
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tests.benchmarks.soaking.world import ROOT, Soak
from tests.checkpoints import read_files
from tests.faults.forks import CHANGES, Forks, Run

_MODULES = {
    "train": "transformers.trainer drift_merge.trainers.sft.run PIL.Image"
    " transformers.models.llava.modeling_llava transformers.models.llava.processing_llava",
    "search": "optuna sqlalchemy.dialects.sqlite drift_merge.searches.run",
}
_SETUP = """
import sys
from pathlib import Path
from tests.real_trainers import tiny
setup = tiny.make_setup("llava", Path(sys.argv[1]))
tiny.write_llava_processor(setup.mllm)
tiny.write_questions(setup.mllm.parent)
print(setup.mllm, setup.prior)
"""
_EVALUATE = """
import json, os, sys
file = os.path.join(sys.argv[1], "drift_merge.json")
weight = (json.load(open(file))["parameters"]["weights"] or [0.1])[0] if os.path.exists(file) else 0
print(1 - (weight - 0.3) ** 2)
"""


class _Program:
    """One command, what an undisturbed run of it makes, and how often it changes the disk."""

    def __init__(self, soak: Soak, name: str) -> None:
        self.name = name
        self.folder = Path(tempfile.mkdtemp(dir=soak.folder, prefix=f"{name}-"))
        variables = {"FORKS_IMPORT": _MODULES[name], "OMP_NUM_THREADS": "1"}
        self.forks = Forks(variables | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"})
        self.words = self.prepare(soak)
        out = self.folder / "whole"
        run = self.forks.run(*self.words, "-o", str(out), count=CHANGES)
        assert run.code == 0, run
        self.num_calls, self.whole = len(run.calls), self.files(out)

    def prepare(self, soak: Soak) -> Sequence[str]:
        """Make the inputs; the command without its output."""
        raise NotImplementedError

    def files(self, out: Path) -> dict[str, bytes]:
        """What must be equal."""
        return read_files(out)

    def again(self, out: Path) -> Run:
        """Go on after a kill."""
        return self.forks.run(*self.words, "-o", str(out))

    def kill(self, soak: Soak, chance: random.Random) -> None:
        """One round: kill -9 at a call that changes the disk, children included; then go on."""
        what = f"{self.name} killed"
        out = soak.outs(chance)[0]
        for _ in range(chance.randint(1, 2)):  # and perhaps once more on the way
            at = chance.randint(1, self.num_calls)
            resumed = self.resume_words(out)
            words = [*self.words, "-o", str(out), *resumed]
            run = self.forks.run(*words, count=CHANGES, at=at, do="kill")
            soak.counts[what] += run.code == -9
            # Killed after the last trace of who made it was removed: it is there, and whole.
            is_done = run.code == 6 and "exists already" in run.stderr and out.exists()
            soak.check(what, run.code in (-9, 0) or is_done, run)
            soak.check(what, not out.exists() or self.files(out) == self.whole, "half-written")
        if not out.exists():
            run = self.again(out)
            soak.check(what, run.code == 0 and self.files(out) == self.whole, "rerun", run)
        shutil.rmtree(out.parent)

    def resume_words(self, out: Path) -> list[str]:
        """What the same command must add after a kill."""
        return []

    def close(self) -> None:
        """End the processes."""
        self.forks.close()


class Training(_Program):
    """A tiny LLaVA on generated pictures."""

    def __init__(self, soak: Soak) -> None:
        super().__init__(soak, "train")

    def prepare(self, soak: Soak) -> Sequence[str]:
        """Model, prior and data."""
        made = subprocess.run(
            [sys.executable, "-c", _SETUP, str(self.folder)],
            cwd=ROOT,
            check=True,
            capture_output=True,
            text=True,
        )
        mllm, prior = made.stdout.split()[-2:]
        data = Path(mllm).parent / "data.jsonl"
        words = ["drift-prior", "train", mllm, "--data", str(data), "--prior", prior]
        words += ["--device", "cpu", "--steps", "4", "--lr", "0.01", "--batch-size", "2"]
        return [*words, "--accumulation", "1", "--save-steps", "1", "-q"]

    def resume_words(self, out: Path) -> list[str]:
        """Told by hand, where there is something."""
        return ["--resume"] if out.with_name(f"{out.name}.run").exists() else []

    def again(self, out: Path) -> Run:
        """Go on after a kill."""
        return self.forks.run(*self.words, "-o", str(out), *self.resume_words(out))


class Searching(_Program):
    """A grid of four weights, evaluated by a program of a few milliseconds."""

    def __init__(self, soak: Soak) -> None:
        super().__init__(soak, "search")

    def prepare(self, soak: Soak) -> Sequence[str]:
        """A recipe and the program."""
        recipe, evaluate = self.folder / "recipe.yaml", self.folder / "evaluate.py"
        lines = ["method: linear", f"reasoner: {soak.pair.reasoner}", f"mllm: {soak.pair.mllm}"]
        recipe.write_text("\n".join(lines))
        evaluate.write_text(_EVALUATE)
        command = shlex.join([sys.executable, "-S", str(evaluate), "{model}"])
        words = ["drift-merge", "search", str(recipe), "--space", "weight=0.1:0.4:0.1"]
        return [*words, "--evaluate", command, "--trials", "4", "--threads", "1", "-q"]

    def files(self, out: Path) -> dict[str, bytes]:
        """The best merge; what lies beside it tells times and interruptions."""
        return {n: d for n, d in read_files(out).items() if n.endswith(".safetensors")}


def train(soak: Soak, chance: random.Random) -> None:
    """kill -9 while training; `--resume` gives the bytes of an undisturbed run."""
    soak.make(Training).kill(soak, chance)


def search(soak: Soak, chance: random.Random) -> None:
    """kill -9 while searching; the same command goes on and finds the same best."""
    soak.make(Searching).kill(soak, chance)
