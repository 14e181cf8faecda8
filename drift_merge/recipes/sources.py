"""Opens the checkpoints that a recipe names: headers and configs, no tensor data."""

from collections.abc import Mapping

from drift_merge.names.tensors import Model
from drift_merge.recipes.recipe import Recipe
from drift_merge.recipes.words import PRIOR
from drift_merge.storage.adapters import base_of, is_adapter, join_adapter
from drift_merge.storage.checkpoint import Checkpoint, open_checkpoint, open_prior_checkpoint
from drift_merge.storage.sources import parse_source


def as_model(checkpoint: Checkpoint, copies: Mapping[str, str] | None = None) -> Model:
    """What the alignment needs to know of a checkpoint.

    Args:
        checkpoint: opened.
        copies: which tensors have equal bytes; None where no data was compared.
    """
    scales = set(checkpoint.scales.values())
    shapes = {n: info.shape for n, info in checkpoint.tensors.items() if n not in scales}
    return Model(checkpoint.source.given, shapes, checkpoint.config, copies)


def open_sources(
    recipe: Recipe, *, headers_only: bool = False, stream: bool = False, quiet: bool = False
) -> tuple[Checkpoint, list[Checkpoint], Checkpoint | None]:
    """Open the mllm, the reasoners and the base (if there is one) of a recipe.

    Args:
        recipe: what is asked for.
        headers_only: from the Hub, fetch headers by range requests instead of whole shards.
        stream: leave the shards on the Hub until they are read, one after the other.
        quiet: no progress bars for downloads.

    Raises:
        SourceError, CheckpointError, RecipeError: see `open_checkpoint`.
    """

    def open_one(text: str) -> Checkpoint:
        return open_checkpoint(text, headers_only=headers_only, stream=stream, quiet=quiet)

    def open_reasoner(text: str) -> Checkpoint:
        if recipe.options.get("is_delta"):
            return open_prior_checkpoint(text, headers_only=headers_only, quiet=quiet)
        source = parse_source(text)
        if not is_adapter(source):
            return open_one(text)
        base = recipe.base or base_of(source)
        return join_adapter(source, open_checkpoint(base, stream=stream, quiet=quiet))

    reasoners = [open_reasoner(text) for text in recipe.reasoners]
    mllm = open_one(recipe.mllm)
    base = open_one(recipe.base) if recipe.base else None
    is_streamed = stream and mllm.source.kind == "hub"
    if is_streamed and recipe.method != PRIOR and not headers_only:
        from drift_merge.storage.hub.shards import fetch_sidecars

        fetch_sidecars(mllm.source, mllm.sidecars)  # a merge is a whole checkpoint
    return mllm, reasoners, base
