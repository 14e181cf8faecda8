"""Kills, faults, damage and races without end: nothing is lost, nothing wrong is told as done.

    python tests/benchmarks/soak.py --minutes 30 [--seed 0] [--state soak.json] [--only kills,train]

Rounds are numbered, and round n of a seed is always the same; the state file says which come next,
so that the same command goes on. A table comes at the end; exit 1 if anything was wrong. Needs gcc;
training and searching are left out where their extras are not installed.
"""

import argparse
import json
import os
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.benchmarks.soaking import damage, disk, hub, programs
from tests.benchmarks.soaking.world import Soak

Round = Callable[[Soak, random.Random], None]
ROUNDS: dict[str, tuple[int, Round]] = {
    "kills": (10, disk.kills),
    "faults": (4, disk.faults),
    "changing": (2, disk.changing),
    "damage": (10, damage.damage),
    "races": (1, disk.races),
    "clocks": (1, disk.clocks),
    "limits": (1, disk.limits),
    "ranks": (1, disk.ranks),
    "push": (2, hub.push),
    "pull": (2, hub.pull),
    "hub_races": (1, hub.races),
}
if find_spec("transformers") and find_spec("PIL"):
    ROUNDS["train"] = (1, programs.train)
if find_spec("optuna"):
    ROUNDS["search"] = (2, programs.search)


def main() -> int:
    """Rounds until the time is over, then a table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else "")
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--state", type=Path, default=Path("soak.json"))
    parser.add_argument("--only", default=",".join(ROUNDS), help="kinds of rounds")
    given = parser.parse_args()
    os.environ["FORKS_SECONDS"] = "600"  # of a run: the machine may be busy
    os.environ["HF_HUB_OFFLINE"] = "1"  # a damaged name must not be looked for
    state = json.loads(given.state.read_text()) if given.state.exists() else {}
    state = state if state.get("seed") == given.seed else {"seed": given.seed}
    number, counts = state.get("next", 0), Counter(state.get("counts", {}))
    wrong = state.get("wrong", [])
    end = time.monotonic() + 60 * given.minutes
    kinds = [name for name in given.only.split(",") for _ in range(ROUNDS[name][0])]
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        soak = Soak(Path(folder).resolve())
        try:
            while time.monotonic() < end:
                chance = random.Random(f"{given.seed}/{number}")
                kind, before, began = chance.choice(kinds), len(soak.wrong), time.monotonic()
                ROUNDS[kind][1](soak, chance)
                soak.counts[f"seconds of {kind}"] += round(time.monotonic() - began)
                for text in soak.wrong[before:]:
                    print(f"WRONG in round {number}: {text}", file=sys.stderr, flush=True)
                number += 1
                total, found = counts + soak.counts, wrong + soak.wrong
                given.state.write_text(
                    json.dumps(
                        {"seed": given.seed, "next": number, "counts": total, "wrong": found}
                    )
                )
        finally:
            soak.close()
    for what, count in sorted(total.items()):
        print(f"{count:8,}  {what}")
    print(f"{len(found):8,}  wrong, in {number:,} rounds of seed {given.seed}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
