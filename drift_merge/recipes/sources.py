"""Opens the checkpoints that a recipe names: headers and configs, no tensor data."""

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from shlex import quote

from drift_merge.errors import SourceError
from drift_merge.names.tensors import Model
from drift_merge.recipes.adapted import join_adapter
from drift_merge.recipes.recipe import Recipe
from drift_merge.recipes.unwrap import unwrap
from drift_merge.recipes.words import PRIOR
from drift_merge.storage.adapters.factors import is_adapter
from drift_merge.storage.adapters.fields import base_of, named_base
from drift_merge.storage.checkpoint import Checkpoint, open_checkpoint, open_prior_checkpoint
from drift_merge.storage.folder.notes import CheckpointNote
from drift_merge.storage.hub.faults import download_command
from drift_merge.storage.sources import Source, parse_source
from drift_merge.storage.weight_map import ADAPTER_CONFIG, IsAdapterError


def as_model(checkpoint: Checkpoint, copies: Mapping[str, str] | None = None) -> Model:
    """What the alignment needs to know of a checkpoint.

    Args:
        checkpoint: opened.
        copies: which tensors have equal bytes; None where no data was compared.
    """
    parts = set(checkpoint.scales.values())
    parts.update(name for found in checkpoint.factors.values() for name in (found.u, found.v))
    parts.update(name for adapter in checkpoint.adapters.values() for name in adapter.names)
    shapes = {n: info.shape for n, info in checkpoint.tensors.items() if n not in parts}
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

    require_revisions([*recipe.reasoners, recipe.mllm, *([recipe.base] if recipe.base else [])])

    def open_one(text: str) -> Checkpoint:
        return open_checkpoint(text, headers_only=headers_only, stream=stream, quiet=quiet)

    def open_reasoner(text: str) -> Checkpoint:
        if recipe.options.get("is_delta"):
            return open_prior_checkpoint(text, headers_only=headers_only, quiet=quiet)
        found = open_unless_adapter(text, open_one)
        return _join(found, recipe, open_one) if isinstance(found, Source) else found

    reasoners = [open_reasoner(text) for text in recipe.reasoners]
    mllm = unwrap(open_one(recipe.mllm))
    base = open_one(recipe.base) if recipe.base else None
    if recipe.method != PRIOR and not headers_only:
        fetch_carried(mllm)
    return mllm, reasoners, base


def require_revisions(texts: Iterable[str]) -> None:
    """Ask for every Hub source before the first of them is fetched, which may take an hour.

    Raises:
        SourceError, CheckpointError: see `parse_source` and `resolve_revision`.
    """
    on_hub = [source for source in map(parse_source, texts) if source.kind == "hub"]
    if len(on_hub) < 2:
        return
    from drift_merge.storage.hub.models import resolve_revision

    for source in on_hub[1:]:
        resolve_revision(source)


def open_unless_adapter(text: str, open_one: Callable[[str], Checkpoint]) -> Checkpoint | Source:
    """Open a whole model; of an adapter, here or on the Hub, say where it is on this disk.

    Args:
        text: what the user wrote.
        open_one: opens a whole model.

    Raises:
        SourceError, CheckpointError: see `open_checkpoint`.
    """
    source = parse_source(text)
    if is_adapter(source):
        return source
    try:
        return open_one(text)
    except IsAdapterError:
        if source.kind == "local":
            raise
        from drift_merge.storage.hub.adapters import fetch_adapter

        return fetch_adapter(source)


def _join(source: Source, recipe: Recipe, open_one: Callable[[str], Checkpoint]) -> Checkpoint:
    """An adapter on its base: the mllm if it names that, else `--base`, else what it names."""
    named = base_of(source) if recipe.base is None else named_base(source)
    is_of_mllm = named is not None and _is_same(named, recipe.mllm)
    text = recipe.mllm if is_of_mllm else recipe.base or named
    assert text is not None
    try:
        base = open_one(text)
    except SourceError as error:
        directory, first = source.given, ""
        if source.kind == "hub":
            directory = "ADAPTER"
            first = f"Download it: {download_command(source)} --local-dir {directory}\n"
        raise SourceError(
            f"{source.given} is a LoRA adapter on {text}. {error.message}",
            remedy=f"{first}Write where its base is into its config:\n"
            'python -c "import json, sys; p, b = sys.argv[1:]; c = json.load(open(p)); '
            "c['base_model_name_or_path'] = b; json.dump(c, open(p, 'w'), indent=1)\" "
            f"{quote(str(Path(directory) / ADAPTER_CONFIG))} BASE",
        ) from error
    joined = join_adapter(source, base)
    is_elsewhere = source.kind == "hub" and base.source.kind == "local"
    if named is None or (_is_same(named, text) and not (is_elsewhere and text == named)):
        return joined
    what = f"the directory {base.path} here" if text == named else text
    message = (
        f"{source.given} was trained on {named}, by its {ADAPTER_CONFIG}; {what} stands for that."
    )
    return replace(joined, notes=(*joined.notes, CheckpointNote("adapter", message)))


def _is_same(one: str, other: str) -> bool:
    """Whether two sources are one directory, or one repository."""
    if one == other:
        return True
    paths = os.path.expanduser(one), os.path.expanduser(other)
    if all(map(os.path.exists, paths)):
        return os.path.realpath(paths[0]) == os.path.realpath(paths[1])
    return not any(map(os.path.exists, paths)) and one.split("@")[0] == other.split("@")[0]


def fetch_carried(mllm: Checkpoint) -> None:
    """Fetch what an output takes over from an mllm on the Hub into the Hub's cache.

    Raises:
        SourceError, OutputError: it cannot be fetched, or not stored.
    """
    if mllm.source.kind == "local" or mllm.path is None:
        return
    from drift_merge.storage.hub.shards import fetch_sidecars

    absent = [name for name in mllm.sidecars if not (mllm.path / name).is_file()]
    fetch_sidecars(mllm.source, absent)
