"""Run the engine in this process, and the same arithmetic in memory on whole tensors."""

from pathlib import Path
from typing import Any

import torch

from drift_merge.engine.job import RunOptions
from drift_merge.maths.differences import delta
from drift_merge.maths.methods.elementwise import interpolate
from drift_merge.merges.apply import apply_prior, apply_recipe
from drift_merge.merges.make import MadeMerge, make_merge
from drift_merge.plans.prepare import prepare
from drift_merge.priors.compress import compress_prior, compress_recipe, plan_compression
from drift_merge.priors.compute import ComputedPrior, compute_prior
from drift_merge.priors.manifest import open_prior
from drift_merge.recipes.recipe import Recipe
from drift_merge.recipes.words import MERGE_MODULES
from tests.checkpoints import Stored

TORCH = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
    "I64": torch.int64,
}
CODES = {dtype: code for code, dtype in TORCH.items()}


def run_prior(
    reasoner: Path,
    mllm: Path,
    out: Path,
    *,
    threads: int = 1,
    overwrite: bool = False,
    **recipe: Any,
) -> ComputedPrior:
    """`drift-prior compute`, without the command line; `base` may be a path."""
    values = {"dtype": "bfloat16"} | recipe
    if values.get("base") is not None:
        values["base"] = str(values["base"])
    request = Recipe(method="prior", reasoners=(str(reasoner),), mllm=str(mllm), **values)
    prepared = prepare(request, quiet=True)
    options = RunOptions(threads=threads, overwrite=overwrite)
    return compute_prior(prepared, prepared.plan(), out, options)


def run_compress(
    prior: Path, out: Path, *, threads: int = 1, overwrite: bool = False, **recipe: Any
) -> ComputedPrior:
    """`drift-prior compress`, without the command line."""
    opened = open_prior(prior)
    plan = plan_compression(opened, compress_recipe(opened, **({"dtype": "int8"} | recipe)))
    return compress_prior(opened, plan, out, RunOptions(threads=threads, overwrite=overwrite))


def run_linear(
    reasoners: Path | list[Path],
    mllm: Path,
    out: Path,
    *weights: float,
    threads: int = 1,
    overwrite: bool = False,
    **recipe: Any,
) -> MadeMerge:
    """`drift-merge linear`, without the command line."""
    listed = reasoners if isinstance(reasoners, list) else [reasoners]
    values = {"modules": MERGE_MODULES} | recipe
    request = Recipe(
        method="linear",
        reasoners=tuple(map(str, listed)),
        mllm=str(mllm),
        weights=weights,
        **values,
    )
    prepared = prepare(request, quiet=True)
    options = RunOptions(threads=threads, overwrite=overwrite)
    return make_merge(prepared, prepared.plan(), out, options)


def run_apply(
    prior: Path, mllm: Path, out: Path, *, scale: float = 0.5, threads: int = 1, **values: Any
) -> MadeMerge:
    """`drift-prior apply`, without the command line."""
    manifest = open_prior(prior).manifest
    recipe = apply_recipe(str(prior), manifest, str(mllm), scale=scale, **values)
    prepared = prepare(recipe, quiet=True)
    return apply_prior(manifest, prepared, prepared.plan(), out, RunOptions(threads=threads))


def as_tensor(stored: Stored) -> torch.Tensor:
    """A stored tensor in its own dtype."""
    if not stored.data:
        return torch.empty(stored.shape, dtype=TORCH[stored.dtype])
    flat = torch.frombuffer(bytearray(stored.data), dtype=TORCH[stored.dtype])
    return flat.reshape(stored.shape)


def as_stored(tensor: torch.Tensor, code: str) -> Stored:
    """A tensor rounded to a dtype, as it would lie on the disk."""
    rounded = tensor.to(TORCH[code]).contiguous()
    data = bytes(rounded.flatten().view(torch.uint8).tolist())
    return Stored(code, tuple(tensor.shape), data)


def in_memory_delta(reasoner: Stored, origin: Stored, code: str = "BF16") -> Stored:
    """The delta of two whole tensors."""
    return as_stored(delta(*_loaded(reasoner, origin)), code)


def in_memory_linear(
    mllm: Stored, reasoners: list[Stored], weights: list[float], code: str | None = None
) -> Stored:
    """The merge of whole tensors."""
    own, *others = _loaded(mllm, *reasoners)
    return as_stored(interpolate(own, others, weights), code or mllm.dtype)


def _loaded(*stored: Stored) -> list[torch.Tensor]:
    compute = torch.float64 if any(s.dtype == "F64" for s in stored) else torch.float32
    return [as_tensor(s).to(compute, copy=True) for s in stored]
