"""Priors from Python: align, compute, compress."""

from pathlib import Path
from typing import TYPE_CHECKING

from drift_merge.api.options import (
    How,
    Running,
    Selecting,
    Where,
    running_options,
    split,
    takes,
    text_of,
)
from drift_merge.names.tensors import Alignment
from drift_merge.plans.prepare import prepare
from drift_merge.priors.compress import compress_prior, compress_recipe, plan_compression
from drift_merge.priors.compute import compute_prior
from drift_merge.priors.manifest import Prior, open_prior
from drift_merge.recipes.options import recipe_options
from drift_merge.recipes.recipe import Recipe
from drift_merge.recipes.words import NORMS, PRIOR

if TYPE_CHECKING:
    from typing_extensions import Unpack


@takes(Selecting)
def align(reasoner: Where, mllm: Where, **how: "Unpack[Selecting]") -> Alignment:
    """Pair the tensors of a reasoner with those of an MLLM's language tower, from headers alone.

    Args:
        reasoner: directory, `.safetensors` file or Hub id of the reasoner.
        mllm: the same of the multimodal model.
        {options}

    Returns:
        Pairs, findings, and a record of every tensor of both. It may be incomplete: compare
        `num_matched` with `num_selected`.

    Raises:
        SourceError, CheckpointError, AlignmentError, RecipeError.
    """
    recipe = Recipe(method=PRIOR, reasoners=(str(reasoner),), mllm=str(mllm), **how)
    return prepare(recipe, headers_only=True, quiet=True).reasoners[0][1]


@takes(How)
def compute(
    reasoner: Where,
    mllm: Where,
    output: Where,
    *,
    base: Where | None = None,
    through: str | None = None,
    rank: int = 0,
    norm: str = NORMS[0],
    **how: "Unpack[How]",
) -> Prior:
    """Stream the prior delta = theta_reasoner - theta_mllm to `output`.

    Args:
        reasoner: directory, `.safetensors` file or Hub id of the reasoner.
        mllm: the same of the multimodal model.
        output: directory to create; absent or whole, whatever happens.
        base: common ancestor; then delta = theta_reasoner - theta_base.
        through: round delta to this dtype before it is compressed.
        rank: store the leading directions of every projection, as factors; 0: all of delta.
        norm: which norm of delta they take on: frobenius, nuclear or none.
        {options}

    Returns:
        The prior, opened.

    Raises:
        SourceError, CheckpointError, AlignmentError, RecipeError, OutputError.

    Source: DRIFT, arXiv 2510.15050, section 3.
    """
    values, running = split(dict(how))
    values.setdefault("dtype", recipe_options(PRIOR)["dtype"][1])
    recipe = Recipe(
        method=PRIOR,
        reasoners=(str(reasoner),),
        mllm=str(mllm),
        base=text_of(base),
        through=through,
        rank=rank,
        norm=norm,
        **values,
    )
    return make_prior(recipe, Path(output), running)


@takes(Running, without=("stream", "cache_limit"))
def compress(
    prior: Where,
    output: Where,
    *,
    dtype: str | None = None,
    rank: int = 0,
    norm: str = NORMS[0],
    max_shard_size: str | None = None,
    **how: "Unpack[Running]",
) -> Prior:
    """Store a prior in 8 bits with a float32 scale per row, or as factors, in `output`.

    Args:
        prior: directory of an uncompressed prior.
        output: directory to create; absent or whole, whatever happens.
        dtype: int8 (the default without a rank) or float8_e4m3fn; of factors bfloat16 (their
            default), float16 or float32.
        rank: of the factors; 0 for none.
        norm: which norm of delta the factors take on: frobenius, nuclear or none.
        max_shard_size: such as "5GB", the default.
        {options}

    Returns:
        The compressed prior, opened; `tensors[name]["cosine_stored"]` says what is kept.

    Raises:
        SourceError, CheckpointError, VerificationError, RecipeError, OutputError.
    """
    opened = open_prior(Path(prior))
    size = {} if max_shard_size is None else {"max_shard_size": max_shard_size}
    stored = dtype or (None if rank else "int8")
    recipe = compress_recipe(opened, dtype=stored, rank=rank, norm=norm, **size)
    plan = plan_compression(opened, recipe)
    with running_options([plan], how) as options:
        return compress_prior(opened, plan, Path(output), options).prior


def make_prior(recipe: Recipe, output: Path, how: Running) -> Prior:
    """Make the prior of a recipe."""
    prepared = prepare(recipe, stream=how.get("stream", False), quiet=not how.get("progress", True))
    plan = prepared.plan()
    with running_options([plan], how) as options:
        return compute_prior(prepared, plan, output, options).prior
