"""The Python face: what the two commands do, as functions. Progress by tqdm, no printing.

import drift_merge

alignment = drift_merge.align("org/reasoner", "org/mllm")
prior = drift_merge.compute("org/reasoner", "org/mllm", "prior/")
merge = drift_merge.linear(["org/reasoner"], "org/mllm", "merged/", weights=[0.1])
"""

import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from drift_merge.engine.job import RunOptions
from drift_merge.merges.make import make_merge
from drift_merge.merges.manifest import Merge
from drift_merge.names.tensors import Alignment
from drift_merge.plans.plan import Plan
from drift_merge.plans.prepare import prepare
from drift_merge.priors.compress import compress_prior, compress_recipe, plan_compression
from drift_merge.priors.compute import compute_prior
from drift_merge.priors.manifest import Prior, open_prior
from drift_merge.recipes.recipe import Recipe
from drift_merge.recipes.words import (
    DEFAULT_CACHE_SIZE,
    DEFAULT_SHARD_SIZE,
    MERGE_MODULES,
    PRIOR_MODULES,
    SOURCE_DTYPE,
)
from drift_merge.storage.sizes import parse_size

Where = str | Path


def align(
    reasoner: Where,
    mllm: Where,
    *,
    modules: str = PRIOR_MODULES,
    layers: str | None = None,
    map_file: Path | None = None,
) -> Alignment:
    """Pair the tensors of a text LLM with those of an MLLM's language tower, from headers alone.

    Args:
        reasoner: directory, `.safetensors` file or Hub id of the text LLM.
        mllm: the same of the multimodal model.
        modules: comma list of attn, mlp, norm, embed, head, full, or `re:REGEX`.
        layers: such as "0:28"; None for all.
        map_file: YAML of name patterns, for layouts that structure alone cannot pair.

    Returns:
        Pairs, findings, and a record of every tensor of both. It may be incomplete: compare
        `num_matched` with `num_selected`.

    Raises:
        SourceError, CheckpointError, AlignmentError, RecipeError.
    """
    recipe = Recipe(
        method="prior",
        reasoners=(str(reasoner),),
        mllm=str(mllm),
        modules=modules,
        layers=layers,
        map_file=map_file,
    )
    return prepare(recipe, headers_only=True, quiet=True).reasoners[0][1]


def compute(
    reasoner: Where,
    mllm: Where,
    output: Where,
    *,
    base: Where | None = None,
    modules: str = PRIOR_MODULES,
    layers: str | None = None,
    dtype: str = "bfloat16",
    max_shard_size: str = DEFAULT_SHARD_SIZE,
    on_mismatch: str = "error",
    map_file: Path | None = None,
    allow_nonfinite: bool = False,
    device: str = "cpu",
    threads: int | None = None,
    stream: bool = False,
    cache_limit: str = DEFAULT_CACHE_SIZE,
    overwrite: bool = False,
    progress: bool = True,
) -> Prior:
    """Stream the prior delta = theta_reasoner - theta_mllm to `output`.

    Args:
        reasoner: directory, `.safetensors` file or Hub id of the text LLM.
        mllm: the same of the multimodal model.
        output: directory to create; absent or whole, whatever happens.
        base: common ancestor; then delta = theta_reasoner - theta_base.
        modules: comma list of attn, mlp, norm, embed, head, full, or `re:REGEX`.
        layers: such as "0:28"; None for all.
        dtype: of the stored delta: bfloat16, float16, float32, source (the mllm's), or compressed:
            int8, float8_e4m3fn.
        max_shard_size: such as "5GB".
        on_mismatch: "error", or "skip" to leave tensors without a partner out.
        map_file: YAML of name patterns.
        allow_nonfinite: accept NaN and Inf in the inputs.
        device: where to compute.
        threads: workers; None for one per core.
        stream: read Hub sources shard by shard (download, use, delete).
        cache_limit: such as "20GB": disk for the shards that lie here at a time.
        overwrite: replace an existing output after success.
        progress: show a tqdm bar.

    Returns:
        The prior, opened.

    Raises:
        SourceError, CheckpointError, AlignmentError, RecipeError, OutputError.

    Source: DRIFT, arXiv 2510.15050, section 3.
    """
    recipe = Recipe(
        method="prior",
        reasoners=(str(reasoner),),
        mllm=str(mllm),
        base=str(base) if base is not None else None,
        modules=modules,
        layers=layers,
        dtype=dtype,
        max_shard_size=max_shard_size,
        on_mismatch=on_mismatch,
        map_file=map_file,
        allow_nonfinite=allow_nonfinite,
    )
    prepared = prepare(recipe, stream=stream, quiet=not progress)
    plan = prepared.plan()
    with _options(plan, device, threads, overwrite, progress, cache_limit) as options:
        return compute_prior(prepared, plan, Path(output), options).prior


def compress(
    prior: Where,
    output: Where,
    *,
    dtype: str = "int8",
    max_shard_size: str = DEFAULT_SHARD_SIZE,
    device: str = "cpu",
    threads: int | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> Prior:
    """Store a prior in 8 bits with a float32 scale per row, in `output`.

    Args:
        prior: directory of an uncompressed prior.
        output: directory to create; absent or whole, whatever happens.
        dtype: int8 or float8_e4m3fn.
        max_shard_size: such as "5GB".
        device: where to compute.
        threads: workers; None for one per core.
        overwrite: replace an existing output after success.
        progress: show a tqdm bar.

    Returns:
        The compressed prior, opened; `tensors[name]["cosine_stored"]` says what is kept.

    Raises:
        SourceError, CheckpointError, VerificationError, RecipeError, OutputError.
    """
    opened = open_prior(Path(prior))
    recipe = compress_recipe(opened, dtype=dtype, max_shard_size=max_shard_size)
    plan = plan_compression(opened, recipe)
    with _options(plan, device, threads, overwrite, progress) as options:
        return compress_prior(opened, plan, Path(output), options).prior


def linear(
    reasoners: Sequence[Where],
    mllm: Where,
    output: Where,
    *,
    weights: Sequence[float] = (),
    modules: str = MERGE_MODULES,
    layers: str | None = None,
    dtype: str = SOURCE_DTYPE,
    max_shard_size: str = DEFAULT_SHARD_SIZE,
    on_mismatch: str = "error",
    map_file: Path | None = None,
    allow_nonfinite: bool = False,
    device: str = "cpu",
    threads: int | None = None,
    stream: bool = False,
    cache_limit: str = DEFAULT_CACHE_SIZE,
    overwrite: bool = False,
    progress: bool = True,
) -> Merge:
    """Write (1 - sum(w)) * mllm + sum(w_i * reasoner_i) as a complete MLLM checkpoint.

    Args:
        reasoners: text LLMs, at least one.
        mllm: the multimodal model; everything not selected is its, byte for byte.
        output: directory to create; absent or whole, whatever happens.
        weights: one per reasoner, or one for all; () means 0.1 each.
        modules: as in `compute`; the default adds the norms.
        layers: such as "0:28"; None for all.
        dtype: of the output: source (the mllm's), bfloat16, float16 or float32.
        max_shard_size: such as "5GB".
        on_mismatch: "error", or "skip" to leave tensors without a partner as they are.
        map_file: YAML of name patterns.
        allow_nonfinite: accept NaN and Inf in the inputs.
        device: where to compute.
        threads: workers; None for one per core.
        stream: read Hub sources shard by shard (download, use, delete).
        cache_limit: such as "20GB": disk for the shards that lie here at a time.
        overwrite: replace an existing output after success.
        progress: show a tqdm bar.

    Returns:
        The merge, opened.

    Raises:
        SourceError, CheckpointError, AlignmentError, RecipeError, OutputError.
    """
    recipe = Recipe(
        method="linear",
        reasoners=tuple(map(str, reasoners)),
        mllm=str(mllm),
        weights=tuple(weights),
        modules=modules,
        layers=layers,
        dtype=dtype,
        max_shard_size=max_shard_size,
        on_mismatch=on_mismatch,
        map_file=map_file,
        allow_nonfinite=allow_nonfinite,
    )
    prepared = prepare(recipe, stream=stream, quiet=not progress)
    plan = prepared.plan()
    with _options(plan, device, threads, overwrite, progress, cache_limit) as options:
        return make_merge(prepared, plan, Path(output), options).merge


@contextmanager
def _options(
    plan: Plan,
    device: str,
    threads: int | None,
    overwrite: bool,
    progress: bool,
    cache_limit: str = DEFAULT_CACHE_SIZE,
) -> Iterator[RunOptions]:
    from tqdm.auto import tqdm

    lock = threading.Lock()
    with tqdm(total=plan.write_bytes, unit="B", unit_scale=True, disable=not progress) as bar:

        def advance(size: int) -> None:
            with lock:  # called from every worker
                bar.update(size)

        yield RunOptions(
            threads=threads or os.cpu_count() or 1,
            device=device,
            overwrite=overwrite,
            progress=advance,
            cache_limit=parse_size(cache_limit),
        )
