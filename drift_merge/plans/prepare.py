"""From a recipe to an alignment: open the sources, read what pairing needs, pair them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from drift_merge.names.align import align, require_complete
from drift_merge.names.name_map import NameMap, SideMap, read_name_map
from drift_merge.names.tensors import Alignment, Finding, Model
from drift_merge.names.tokens.files import Vocabularies
from drift_merge.plans.copies import find_copies
from drift_merge.plans.folders import folder_notes, table_notes
from drift_merge.plans.merge import plan_merge
from drift_merge.plans.plan import Plan
from drift_merge.plans.prior import plan_prior
from drift_merge.plans.vocabularies import read_vocabularies
from drift_merge.recipes.recipe import Recipe
from drift_merge.recipes.sources import as_model, open_sources
from drift_merge.recipes.words import PRIOR
from drift_merge.storage import fingerprints
from drift_merge.storage.checkpoint import Checkpoint
from drift_merge.storage.folder.notes import CheckpointNote
from drift_merge.storage.folder.scan import require_carried
from drift_merge.storage.quantized import refuse_quantized

_UNUSED = ("outside_tower", "not_selected")  # records of tensors that nothing is computed of


@dataclass(frozen=True, slots=True)
class Prepared:
    """The opened sources of a recipe, each aligned with the mllm. No tensor data is read."""

    recipe: Recipe
    mllm: Checkpoint
    reasoners: tuple[tuple[Checkpoint, Alignment], ...]
    base: tuple[Checkpoint, Alignment] | None = None

    @property
    def findings(self) -> tuple[Finding, ...]:
        """What is to be known of the checkpoints, and of all alignments; each once."""
        pairs = [*self.reasoners, *([self.base] if self.base else [])]
        notes: list[CheckpointNote] = []
        if self.recipe.method != PRIOR:
            notes += folder_notes(self.mllm)
        notes += table_notes(self.mllm, self.reasoners)
        found = [Finding(note.code, "info", note.message, "") for note in notes]
        found += [finding for _, alignment in pairs for finding in alignment.findings]
        return tuple(dict.fromkeys(found))

    def plan(self) -> Plan:
        """The plan of the recipe.

        Raises:
            AlignmentError: a selected tensor has no partner, or none has one.
            CheckpointError: a selected tensor is quantized.
        """
        if self.recipe.computes:
            for checkpoint, alignment in [*self.reasoners, *([self.base] if self.base else [])]:
                used = [r for r in alignment.records if r.status not in _UNUSED]
                refuse_quantized(self.mllm, [name for record in used for name in record.mllm])
                refuse_quantized(checkpoint, [n for record in used for n in record.reasoner])
        for _, alignment in self.reasoners:
            require_complete(alignment, on_mismatch=self.recipe.on_mismatch)
        if self.base is not None:
            require_complete(self.base[1], on_mismatch=self.recipe.on_mismatch)
        if self.recipe.method != PRIOR:
            if self.mllm.path is not None and self.mllm.source.kind == "local":
                require_carried(self.mllm.path, self.mllm.folder, self.mllm.source.given)
            return plan_merge(self.recipe, self.mllm, self.reasoners, self.base)
        reasoner, alignment = self.reasoners[0]
        return plan_prior(self.recipe, self.mllm, reasoner, alignment, self.base)


def prepare(
    recipe: Recipe,
    *,
    headers_only: bool = False,
    stream: bool = False,
    quiet: bool = False,
    are_peers: bool = False,
) -> Prepared:
    """Open and align the sources of a recipe.

    Args:
        recipe: what is asked for.
        headers_only: from the Hub, fetch headers by range requests instead of whole shards.
        stream: leave the shards on the Hub until they are read, one after the other.
        quiet: no progress bars for downloads.
        are_peers: any two models, to be looked at only: neither must have a vision tower.

    Raises:
        SourceError, CheckpointError, AlignmentError, RecipeError: see the parts.
    """
    mllm, reasoners, base = open_sources(
        recipe, headers_only=headers_only, stream=stream, quiet=quiet
    )
    others = [*reasoners, *([base] if base else [])]
    aligned = list(zip(others, _align_all(others, mllm, recipe, are_peers=are_peers), strict=True))
    with_base = aligned.pop() if base else None
    return Prepared(recipe, mllm, tuple(aligned), with_base)


def _align_all(
    others: Sequence[Checkpoint], mllm: Checkpoint, recipe: Recipe, *, are_peers: bool
) -> list[Alignment]:
    """Align each checkpoint with the mllm; all take the same names for one parameter."""
    copies = find_copies(mllm)
    is_delta = bool(recipe.options.get("is_delta"))
    is_plain = not copies  # then only a reasoner's own head may be a copy that matters
    models = [
        as_model(other, None if is_delta else find_copies(other, tables_only=is_plain))
        for other in others
    ]
    name_map = read_name_map(recipe.map_file) if recipe.map_file else None
    known = Vocabularies()

    def align_one(other: Checkpoint, model: Model) -> Alignment:
        if is_delta:
            found = _align_deltas(model, as_model(mllm, copies), recipe)
        else:
            found = align(
                model,
                as_model(mllm, copies),
                modules=recipe.modules,
                layers=recipe.layers,
                name_map=name_map,
                vocabularies=lambda: read_vocabularies(other, mllm, known),
                is_tower=are_peers,
                has_router_biases=are_peers or recipe.method != PRIOR,
            )
        notes = (Finding(n.code, "info", n.message, "") for n in (*other.notes, *mllm.notes))
        return replace(found, findings=(*found.findings, *notes))

    while True:
        found = [align_one(*each) for each in zip(others, models, strict=True)]
        apart = frozenset().union(*(alignment.copies_apart for alignment in found))
        if copies is None or all(alignment.copies_apart == apart for alignment in found):
            return found
        # What is two parameters to one of them is two to all.
        copies = {name: first for name, first in copies.items() if name not in apart}


def _align_deltas(deltas: Model, mllm: Model, recipe: Recipe) -> Alignment:
    """Pair the deltas of a prior, by canonical name, with the mllm."""
    return align(
        deltas,
        mllm,
        modules=recipe.modules,
        layers=recipe.layers,
        name_map=NameMap(reasoner=SideMap(tower="")),
        rows_by_number=True,
    )


def changed_sources(layouts: Mapping[str, str], prepared: Prepared, file: str) -> list[str]:
    """A sentence for each source that is not laid out as when the manifest was written.

    Args:
        layouts: fingerprints by role, as the manifest has them.
        prepared: the opened sources.
        file: name of the manifest, for the message.
    """
    checkpoints = {f"reasoner {i}": c for i, (c, _) in enumerate(prepared.reasoners, start=1)}
    checkpoints["mllm"] = prepared.mllm
    if prepared.base is not None:
        checkpoints["base"] = prepared.base[0]
    return [
        f"Warning [layout]: the {role} {checkpoint.source.label} is not what {file} was made "
        f"with: its tensor names, dtypes or shapes have changed ({layouts[role]}, "
        f"now {found})."
        for role, checkpoint in checkpoints.items()
        if role in layouts and (found := fingerprints.of_layout(checkpoint)) != layouts[role]
    ]
