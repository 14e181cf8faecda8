"""What the tests of pages share: a small pair, and the naive statistics of two arrays."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from drift_merge.reports.compare import Comparison, plan_comparison, run_comparison
from drift_merge.reports.measure import MeasureOptions
from tests import checkpoints as c
from tests.runs import run_linear, run_prior

WORDS = {"tokenizer.json": c.tokenizer()}


class Made(NamedTuple):
    """A pair with its ancestor, a prior and a merge of it."""

    reasoner: Path
    mllm: Path
    base: Path
    prior: Path
    merged: Path


def make(directory: Path, **pair: Any) -> Made:
    """Everything that a page can be written on."""
    made = c.make_pair(directory, reasoner_sidecars=WORDS, mllm_sidecars=WORDS, **pair)
    layers = pair.get("layers", 2)
    base = c.random_tensors(c.text_shapes(layers), 5)
    c.write_checkpoint(directory / "base", base, c.text_config(layers), sidecars=WORDS)
    allow = {"allow_nonfinite": True}
    run_prior(*made, directory / "prior", modules="full", **allow)
    run_linear(made.reasoner, made.mllm, directory / "merged", 0.25, dtype="float32", **allow)
    return Made(*made, directory / "base", directory / "prior", directory / "merged")


def compare(a: Path, b: Path, base: Path | None = None, **more: Any) -> Comparison:
    """`drift-merge compare`, without the command line."""
    rank = more.pop("with_stable_rank", False)
    plan = plan_comparison(str(a), str(b), base=None if base is None else str(base), **more)
    options = MeasureOptions(threads=more.get("threads", 1), cache_limit=10**9)
    return run_comparison(plan, options, with_stable_rank=rank)


def naive(a: np.ndarray, b: np.ndarray, base: np.ndarray | None = None) -> dict[str, float | None]:
    """Every statistic by its definition, in float64."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    delta = a - b
    found: dict[str, Any] = {
        "norm_delta": float(np.linalg.norm(delta.ravel())),
        "norm_a": float(np.linalg.norm(a.ravel())),
        "norm_b": float(np.linalg.norm(b.ravel())),
        "cosine": None,
        "equal": float((delta == 0).mean()),
        "max_abs_delta": float(np.abs(delta).max()),
        "sign_agreement": None,
    }
    scale = found["norm_a"] * found["norm_b"]
    if scale:
        found["cosine"] = float(a.ravel() @ b.ravel() / scale)
    if base is not None:
        one, other = np.sign(a - base), np.sign(b - base)
        both = (one != 0) & (other != 0)
        found["sign_agreement"] = float((one == other)[both].mean()) if both.any() else None
    return found
