"""Files with one change each: a clean error with a documented code, or an answer; in bounds.

Calls are made in this process: what reads a file, through Python; every twentieth, the command
line. No file outside of the inputs may be opened, no call may take 10 seconds (of the
processor: this machine may be busy) or 500 MB.
"""

import json
import os
import random
import resource
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from drift_merge.errors import DriftMergeError
from drift_merge.merges.manifest import open_merge
from drift_merge.plans.prepare import prepare
from drift_merge.priors.manifest import open_prior, open_shards
from drift_merge.recipes.files import read_recipe
from drift_merge.recipes.recipe import Recipe
from tests.adapters import modules_of, write_adapter
from tests.benchmarks.soaking.world import DOCUMENTED, Soak
from tests.checkpoints import Pair, make_pair, tokenizer
from tests.faults.forks import Run
from tests.faults.harness import run as run_here

_PER_ROUND = 400
_SECONDS, _BYTES = 10.0, 500 * 2**20
_WHAT = "damaged file"


class Victim(NamedTuple):
    """A file, what reads it in Python, and a command that does."""

    path: Path
    read: Callable[[], Any]
    words: list[str]


class Damage:
    """Inputs of every kind, all small, and which files were opened outside of them."""

    def __init__(self, soak: Soak) -> None:
        self.folder = Path(tempfile.mkdtemp(dir=soak.folder, prefix="damage-"))
        files = {"tokenizer.json": tokenizer(), "generation_config.json": b"{}"}
        files["tokenizer_config.json"] = b'{"added_tokens_decoder": {"3": {"content": "x"}}}'
        self.pair = pair = make_pair(
            self.folder, layers=1, num_shards=2, reasoner_sidecars=files, mllm_sidecars=files
        )
        self.out = self.folder / "out"
        for words in (
            ["drift-prior", "compute", *pair.arguments, "-o", f"{self.folder}/prior"],
            [
                "drift-prior",
                "compress",
                f"{self.folder}/prior",
                "--dtype",
                "int8",
                "-o",
                f"{self.folder}/int8",
            ],
            ["drift-merge", "linear", *pair.arguments, "-o", f"{self.folder}/merged"],
        ):
            assert run_here(*words).code == 0
        chosen = modules_of(pair.reasoner, lambda name: "proj" in name)
        write_adapter(self.folder / "lora", pair.reasoner, chosen)
        self.victims = [*self._models(pair), *self._artifacts(pair), *self._recipes(pair)]
        self.foreign: set[str] = set()
        self._own = tuple(
            {str(self.folder), "/proc", "/sys", "/dev", "/etc", *filter(None, sys.path)}
            | {os.path.expanduser("~/.cache/huggingface")}  # a name may be that of a Hub id
        )
        self._is_watching = False
        sys.addaudithook(self._look)

    def _models(self, pair: Pair) -> list[Victim]:
        lora = str(self.folder / "lora")
        found = []
        for role, sources in (
            ("mllm", pair.arguments),
            ("reasoner", pair.arguments),
            ("lora", (lora, str(pair.mllm))),
        ):
            reasoner, mllm = (str(each) for each in sources)
            recipe = Recipe(method="prior", reasoners=(reasoner,), mllm=mllm, modules="full")
            words = ["drift-prior", "align", reasoner, mllm, "--modules", "full"]

            def read(recipe: Recipe = recipe) -> Any:
                return prepare(recipe, headers_only=True, quiet=True).plan()

            for path in sorted((self.folder / role).iterdir()):
                if path.suffix in (".json", ".safetensors"):
                    found.append(Victim(path, read, words))
        return found

    def _artifacts(self, pair: Pair) -> list[Victim]:
        found = []
        for name in ("prior", "int8", "merged"):
            folder = self.folder / name
            program = "drift-merge" if name == "merged" else "drift-prior"

            def read(folder: Path = folder) -> Any:
                return open_merge(folder) if folder.name == "merged" else _shards(folder)

            if name != "int8":
                manifest = next(folder.glob("*[er].json"))
                words = ["drift-merge", "run", str(manifest), "-o", str(self.out), "--dry-run"]
                again = partial(read_recipe, manifest)
                found.append(Victim(manifest, lambda again=again: again().recipe(), words))
            for path in sorted(folder.iterdir()):
                if path.suffix == ".json" or (path.suffix == ".safetensors" and name != "merged"):
                    words = [program, _command(path), str(folder)]
                    found.append(Victim(path, read, words))
        return found

    def _recipes(self, pair: Pair) -> list[Victim]:
        own = f"method: linear\nreasoner: {pair.reasoner}\nmllm: {pair.mllm}\nweight: 0.1\n"
        models = "\n".join(
            f"  - model: {each}\n    parameters: {{weight: 0.5}}"
            for each in (pair.reasoner, pair.mllm)
        )
        theirs = f"merge_method: linear\nmodels:\n{models}\ndtype: bfloat16\n"
        found = []
        for name, text in (("own.yaml", own), ("mergekit.yaml", theirs)):
            path = self.folder / name
            path.write_text(text)
            words = ["drift-merge", "run", str(path), "-o", str(self.out), "--dry-run"]
            found.append(Victim(path, lambda path=path: read_recipe(path), words))
        return found

    def _look(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self._is_watching and event == "open" and isinstance(arguments[0], str):
            path = os.path.abspath(arguments[0])
            if not path.startswith(self._own):
                self.foreign.add(path)

    def call(self, victim: Victim, *, is_command: bool) -> Run:
        """Read the damaged file; how it ended."""
        self._is_watching = True
        try:
            if is_command:
                return Run(*run_here(*victim.words), [], [])
            victim.read()
        except DriftMergeError as error:
            return Run(error.exit_code, "", error.message, [], [])
        except Exception:
            return Run(70, "", traceback.format_exc(), [], [])
        finally:
            self._is_watching = False
        return Run(0, "", "", [], [])

    def close(self) -> None:
        """An audit hook stays; it looks at nothing now."""
        shutil.rmtree(self.folder)


def _shards(folder: Path) -> Any:
    return open_shards(open_prior(folder))


def _command(path: Path) -> str:
    """The command that reads most of an artifact's file."""
    return "verify" if path.suffix == ".safetensors" else "inspect"


def damage(soak: Soak, chance: random.Random) -> None:
    """A few hundred files, one after the other."""
    world = soak.make(Damage)
    base = _peak()
    for _ in range(_PER_ROUND):
        victim = chance.choice(world.victims)
        path, before = victim.path, victim.path.read_bytes()
        after = mutated(before, chance, is_header=path.suffix == ".safetensors")
        is_command = chance.random() < 0.05
        path.write_bytes(after)
        began = time.process_time()
        found = world.call(victim, is_command=is_command)
        seconds = time.process_time() - began
        path.write_bytes(before)
        soak.check(_WHAT, seconds < _SECONDS, path.name, f"{seconds:.1f} s", after[:300])
        is_clean = soak.is_clean(found) or (is_command and found.code == 0)
        soak.check(
            _WHAT,
            is_clean and found.code in DOCUMENTED,
            path.name,
            found.code,
            found.stderr[-700:],
            after[:300],
        )
        if path.suffix != ".yaml":  # which names its sources
            soak.check(_WHAT, not world.foreign, path.name, "opened", world.foreign, after[:900])
        world.foreign.clear()
        soak.check(_WHAT, not world.out.exists(), path, "left an output")
        kind = "header" if path.suffix == ".safetensors" else path.name
        soak.counts[_WHAT] += 1
        soak.counts[f"{_WHAT}: {kind}"] += 1
        soak.counts[f"{_WHAT}: all that were refused"] += found.code != 0
    soak.check(_WHAT, _peak() - base < _BYTES, f"{(_peak() - base) / 2**20:.0f} MB more")


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def mutated(data: bytes, chance: random.Random, *, is_header: bool) -> bytes:
    """One change at a random place; of a shard within its length and header."""
    end = min(len(data), 8 + int.from_bytes(data[:8], "little")) if is_header else len(data)
    if not is_header and chance.random() < 0.5 and (changed := _other_value(data, chance)):
        return changed
    at = chance.randrange(max(end, 1))
    kind = chance.randrange(6)
    if kind == 0:
        return data[:at]
    if kind == 1:
        return data[:at] + bytes([chance.randrange(256)]) + data[at + 1 :]
    if kind == 2:
        words = [b"9", b"-", b"]", b'"', b"{", b"null", b"1e999", b"[" * 9999, b"\xff\xfe"]
        return data[:at] + chance.choice(words) + data[at:]
    if kind == 3:
        return data[:at] + data[at + chance.randint(1, 16) :]
    if kind == 4:
        return data[:at] + data[at : at + chance.randint(1, 64)] * 2 + data[at:]
    digits = [i for i in range(end) if chr(data[i]).isdigit()]
    at = chance.choice(digits) if digits else at
    return data[:at] + str(chance.randrange(10**12)).encode() + data[at + 1 :]


_VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2**31, 2**63, 10**30, 0.5, -1e300, float("nan"), float("inf")),
    *("", "x", "../../etc/passwd", "/etc/passwd", "\x00", "\ud800", "a" * 70000),
    *([], [None], [[]], {}, {"a": {}}, [1, 2, 3], ["model"]),
)


def _other_value(data: bytes, chance: random.Random) -> bytes | None:
    """JSON with another value at one of its places; None if this is no JSON."""
    try:
        root = json.loads(data)
    except ValueError:
        return None
    places: list[tuple[Any, Any]] = []
    stack = [root]
    while stack:
        here = stack.pop()
        for key in here if isinstance(here, dict) else range(len(here)):
            places.append((here, key))
            if isinstance(here[key], dict | list):
                stack.append(here[key])
    if not places:
        return None
    here, key = chance.choice(places)
    if chance.random() < 0.2:
        del here[key]
    elif isinstance(here, dict) and chance.random() < 0.2:
        here[str(chance.choice(_VALUES))] = here.pop(key)
    else:
        here[key] = chance.choice(_VALUES)
    return json.dumps(root).encode()
