"""Searches for the browser: real ones, and what they wrote into `search.json`."""

from pathlib import Path
from typing import Any

import drift_merge
from drift_merge.errors import EvaluationError
from drift_merge.searches.pages.page import open_search
from tests import checkpoints as c

NAMES = ("search", "search-rungs", "search-one", "search-failed")


def _weight_of(model: Path) -> float:
    if not (model / "drift_merge.json").exists():
        return 0.0
    return float((drift_merge.open_merge(model).manifest["parameters"]["weights"] or [0.1])[0])


def _scores(model: Path) -> drift_merge.Scores:
    """Two metrics that pull apart; weights of 0.035 to 0.055 fail."""
    weight = _weight_of(model)
    if 0.035 < weight < 0.055:
        raise ValueError("CUDA out of memory\nTried to allocate 2.00 GiB")
    right = {"sums": round(20 + 100 * weight), "pictures": round(70 - 60 * weight**2)}
    items = {m: {str(i): float(i < n) for i in range(100)} for m, n in right.items()}
    return drift_merge.Scores({m: n / 100 for m, n in right.items()}, items)


def _loss(model: Path, limit: str) -> float:
    return 2000.0 + 1e4 * (_weight_of(model) - 0.2) ** 2 + (0 if limit == "all" else 30)


def make(directory: Path) -> dict[str, dict[str, Any]]:
    """The contents of `search.json` by name, each of a search in `directory/NAME`."""
    pair = c.make_pair(directory / "pair")
    recipe = drift_merge.Recipe(
        method="linear", reasoners=(str(pair.reasoner),), mllm=str(pair.mllm), modules="attn"
    )

    def search(name: str, space: list[str], objective: Any, **how: Any) -> dict[str, Any]:
        out = directory / name
        try:
            how = {"progress": False, "threads": 1} | how
            drift_merge.search(recipe, space, objective, output=out, **how)
        except EvaluationError:
            assert name == "search-failed"
        return open_search(out.with_name(f"{name}.search"))

    def fail(model: Path) -> float:
        if model != pair.mllm:
            raise OSError("disk on fire: /data/a-long-path-that-a-phone-must-break/" + "x" * 60)
        return 0.25

    both = ["weight=0.01:0.5:log", "modules=attn|attn,mlp|attn,norm"]
    plain = ["weight=0.05:0.4", "modules=attn|attn,mlp,norm"]
    rungs: dict[str, Any] = {"rungs": ("10", "100", "all"), "metrics": ("loss",), "seed": 3}
    return {
        "search": search(
            "search", both, _scores, metrics=("sums", "pictures"), trials=24, final=_scores
        ),
        "search-rungs": search(
            "search-rungs", plain, _loss, minimize=("loss",), trials=12, sampler="random", **rungs
        ),
        "search-one": search("search-one", ["weight=0.1:0.4"], _weight_of, trials=1),
        "search-failed": search("search-failed", both, fail, trials=3),
    }
