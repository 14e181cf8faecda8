"""From a recipe to an alignment: open the sources, read what pairing needs, pair them."""

import re
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from drift_merge.engine.merge_plan import plan_merge
from drift_merge.engine.plan import Plan, plan_prior
from drift_merge.engine.preflight import refuse_quantized
from drift_merge.engine.recipe import PRIOR, Recipe
from drift_merge.names.align import align, require_complete
from drift_merge.names.name_map import NameMap, SideMap, read_name_map
from drift_merge.names.tensors import Alignment, Finding, Model
from drift_merge.names.vocabulary import Vocabularies, Vocabulary
from drift_merge.storage.adapters import base_of, is_adapter, join_adapter
from drift_merge.storage.checkpoint import Checkpoint, open_checkpoint, open_deltas
from drift_merge.storage.sources import parse_source

TOKENIZER = "tokenizer.json"


@dataclass(frozen=True, slots=True)
class Prepared:
    """The opened sources of a recipe, each aligned with the mllm. No tensor data is read."""

    recipe: Recipe
    mllm: Checkpoint
    reasoners: tuple[tuple[Checkpoint, Alignment], ...]
    base: tuple[Checkpoint, Alignment] | None = None

    @property
    def findings(self) -> tuple[Finding, ...]:
        """The findings of all alignments, each once."""
        pairs = [*self.reasoners, *([self.base] if self.base else [])]
        found = [finding for _, alignment in pairs for finding in alignment.findings]
        return tuple(dict.fromkeys(found))

    def plan(self) -> Plan:
        """The plan of the recipe.

        Raises:
            AlignmentError: a selected tensor has no partner, or none has one.
            CheckpointError: a selected tensor is quantized.
        """
        if self.recipe.computes:
            others = [*self.reasoners, *([self.base] if self.base else [])]
            refuse_quantized([self.mllm, *(checkpoint for checkpoint, _ in others)])
        for _, alignment in self.reasoners:
            require_complete(alignment, on_mismatch=self.recipe.on_mismatch)
        if self.base is not None:
            require_complete(self.base[1], on_mismatch=self.recipe.on_mismatch)
        if self.recipe.method != PRIOR:
            return plan_merge(self.recipe, self.mllm, self.reasoners, self.base)
        reasoner, alignment = self.reasoners[0]
        return plan_prior(self.recipe, self.mllm, reasoner, alignment, self.base)


def prepare(
    recipe: Recipe, *, headers_only: bool = False, stream: bool = False, quiet: bool = False
) -> Prepared:
    """Open and align the sources of a recipe.

    Args:
        recipe: what is asked for.
        headers_only: from the Hub, fetch headers by range requests instead of whole shards.
        stream: leave the shards on the Hub until they are read, one after the other.
        quiet: no progress bars for downloads.

    Raises:
        SourceError, CheckpointError, AlignmentError, RecipeError: see the parts.
    """
    name_map = read_name_map(recipe.map_file) if recipe.map_file else None

    def open_one(text: str) -> Checkpoint:
        return open_checkpoint(text, headers_only=headers_only, stream=stream, quiet=quiet)

    def open_reasoner(text: str) -> Checkpoint:
        if recipe.options.get("is_delta"):
            return open_deltas(text, headers_only=headers_only, quiet=quiet)
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
        from drift_merge.storage.hub_shards import fetch_sidecars

        fetch_sidecars(mllm.source, mllm.sidecars)  # a merge is a whole checkpoint
    known = Vocabularies()
    aligned = [(other, pair(other, mllm, recipe, name_map, known)) for other in reasoners]
    with_base = (base, pair(base, mllm, recipe, name_map, known)) if base else None
    return Prepared(recipe, mllm, tuple(aligned), with_base)


def pair(
    reasoner: Checkpoint,
    mllm: Checkpoint,
    recipe: Recipe,
    name_map: NameMap | None = None,
    known: Vocabularies | None = None,
) -> Alignment:
    """Align one checkpoint with the mllm, reading both vocabularies if rows are selected."""
    if recipe.options.get("is_delta"):
        return _pair_deltas(reasoner, mllm, recipe)
    return align(
        as_model(reasoner),
        as_model(mllm),
        modules=recipe.modules,
        layers=recipe.layers,
        name_map=name_map,
        vocabularies=_vocabularies(reasoner, mllm, recipe.modules, known or Vocabularies()),
    )


def _pair_deltas(deltas: Checkpoint, mllm: Checkpoint, recipe: Recipe) -> Alignment:
    """Pair the deltas of a prior, by canonical name, with the mllm."""
    return align(
        as_model(deltas),
        as_model(mllm),
        modules=recipe.modules,
        layers=recipe.layers,
        name_map=NameMap(reasoner=SideMap(tower="")),
        # Rows of a prior are already those of the mllm: equal vocabularies pair them by number.
        vocabularies=({}, {}),
    )


def as_model(checkpoint: Checkpoint) -> Model:
    """What the alignment needs to know of a checkpoint."""
    scales = set(checkpoint.scales.values())
    shapes = {n: info.shape for n, info in checkpoint.tensors.items() if n not in scales}
    return Model(checkpoint.source.given, shapes, checkpoint.config)


def _vocabularies(
    reasoner: Checkpoint, mllm: Checkpoint, modules: str, known: Vocabularies
) -> tuple[Vocabulary, Vocabulary] | None:
    """Both vocabularies if rows may be selected and can be read; else None, and align refuses."""
    if not re.search(r"embed|head|full|re:", modules) or find_spec("tokenizers") is None:
        return None
    paths = [_tokenizer(reasoner), _tokenizer(mllm)]
    if paths[0] is None or paths[1] is None:
        return None
    return known.read(paths[0]), known.read(paths[1])


def _tokenizer(checkpoint: Checkpoint) -> Path | None:
    if TOKENIZER not in checkpoint.sidecars:
        return None
    if checkpoint.path is not None and (checkpoint.path / TOKENIZER).is_file():
        return checkpoint.path / TOKENIZER
    from drift_merge.storage import hub

    return hub.fetch_file(checkpoint.source, TOKENIZER)
