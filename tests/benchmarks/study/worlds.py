"""What a study is made of: tiny models, or SmolLM2-135M in the same roles.

transformers is imported where models are made: tables are made from stored runs without it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import drift_merge
from tests.benchmarks.study import data, rows
from tests.benchmarks.study.data import Words
from tests.benchmarks.study.rows import Row

Say = Callable[[str], None]
Makers = dict[str, Callable[[Path], object]]


@dataclass(frozen=True, slots=True)
class World:
    """Models, and how much is learnt and asked."""

    makers: Callable[[Path, Say], Makers]  # of folders of the study, in order
    threads: int  # of the makers; a run of a row has one
    words: Callable[[Path], Words]
    is_trained: Callable[[str], bool]  # whether fine-tuning changes a parameter of this name
    rows: tuple[Row, ...]
    rates: tuple[float, ...]  # of SFT
    tuning_seeds: tuple[int, ...]
    passes: int
    curve: tuple[int, int]  # steps between two looks at the validation split, items of a look
    items: dict[str, int]  # of each measure
    results: str  # where its runs are committed, below this folder


def _tiny_makers(out: Path, say: Say) -> Makers:
    from tests.benchmarks.study import models

    return {
        "B": lambda to: models.make_ancestor(to, steps=800, say=say),
        "R": lambda to: models.make_reasoner(out / "B", to, steps=1500, say=say),
        "M": lambda to: models.make_mllm(out / "B", to, steps=2400, say=say),
        **_priors(out, "delta", "delta_base", "rank1", "rank16"),
    }


def _smollm2_words(out: Path) -> Words:
    from tests.benchmarks.study import smollm2

    return smollm2.words(out)


def _smollm2_makers(out: Path, say: Say) -> Makers:
    from tests.benchmarks.study import smollm2

    tiny = _tiny_makers(out / "tiny", say)
    return {
        **{f"tiny/{name}": tiny[name] for name in ("B", "M")},
        "B": smollm2.make_ancestor,
        "R": lambda to: smollm2.make_reasoner(out, to, say),
        "M": lambda to: smollm2.make_mllm(out, to, say),
        **_priors(out, "delta"),
    }


def _priors(out: Path, *names: str) -> Makers:
    options: dict[str, dict[str, Any]] = {
        "delta": {},
        "delta_base": {"base": out / "B"},
        "rank1": {"rank": 1},
        "rank16": {"rank": 16},
    }

    def make(name: str, to: Path) -> object:
        full = {"dtype": "float32", "progress": False}
        return drift_merge.compute(out / "R", out / "M", to, **full, **options[name])

    return {name: lambda to, name=name: make(name, to) for name in names}


WORLDS = {
    "tiny": World(
        makers=_tiny_makers,
        threads=1,
        words=lambda _out: data.CHARACTERS,
        is_trained=lambda name: "language_model" in name or "lm_head" in name,
        rows=(*rows.ROWS, *rows.SWEEPS),
        rates=(3e-4, 1e-3, 3e-3),
        tuning_seeds=rows.TUNING_SEEDS,
        passes=12,
        curve=(37, 100),  # two passes over 300 examples
        items={"picture_sums": 300, "reading": 200, "easy_vqa": 300, "text_sums": 200},
        results="results",
    ),
    "smollm2": World(
        makers=_smollm2_makers,
        threads=2,
        words=_smollm2_words,
        is_trained=lambda name: "language_model" in name and "embed_tokens" not in name,
        rows=rows.SMOLLM2,
        rates=(1e-4, 3e-4),
        tuning_seeds=rows.TUNING_SEEDS[:1],
        passes=3,
        curve=(10, 50),
        items={"picture_sums": 200, "reading": 100, "easy_vqa": 100, "text_sums": 100},
        results="results/smollm2",
    ),
}
