"""How a source fills an output tensor, and the dtype in which that tensor is stored."""

from collections.abc import Mapping

from drift_merge.errors import AlignmentError
from drift_merge.names.layouts import is_router_bias
from drift_merge.names.tensors import Pair, RowMap, identity_parts, is_identity
from drift_merge.plans.plan import Step, View, place_of
from drift_merge.recipes.recipe import Recipe
from drift_merge.recipes.words import DTYPE_CODES, SOURCE_DTYPE
from drift_merge.storage.adapters.fields import read_fields
from drift_merge.storage.adapters.refusals import merge_by_peft
from drift_merge.storage.checkpoint import Checkpoint
from drift_merge.storage.forms.compressed import (
    CODES,
    COMPRESSED,
    SCALE_SUFFIX,
    scale_name,
    stored_as,
)
from drift_merge.storage.forms.factored import U_SUFFIX, V_SUFFIX
from drift_merge.storage.quantized import FLOATS, TABLES


def output_dtype(recipe: Recipe, stored: str, name: str = "") -> str:
    """The dtype code of an output tensor whose mllm tensor `name` is `stored`.

    Biases that balance experts stay as they are: their steps are lost in 16 bits.
    """
    if recipe.dtype == SOURCE_DTYPE or stored not in FLOATS or is_router_bias(name):
        return stored
    return DTYPE_CODES[recipe.dtype]


def store_as(recipe: Recipe, step: Step) -> Step:
    """A step of a prior with the dtype that it is stored in.

    Args:
        recipe: of the prior.
        step: its `dtype` is the mllm's.

    Raises:
        AlignmentError: its name looks like that of the scales of another tensor.
    """
    if recipe.dtype not in COMPRESSED and not recipe.rank:
        return step._replace(dtype=output_dtype(recipe, step.dtype))
    suffix = next((s for s in (SCALE_SUFFIX, U_SUFFIX, V_SUFFIX) if step.name.endswith(s)), None)
    if suffix is not None:
        raise AlignmentError(
            f"{step.name} ends with {suffix!r}, as the scales or factors of other tensors do.",
            remedy="Store this prior uncompressed: --dtype bfloat16, without --rank",
        )
    through = ""
    if recipe.through is not None:
        through = step.dtype if recipe.through == SOURCE_DTYPE else DTYPE_CODES[recipe.through]
    if recipe.rank:
        sizes = [min(p.height, p.width) for p in map(place_of, step.matrices)]
        # All directions of a matrix are the matrix itself.
        rank = recipe.rank if recipe.rank < max(sizes, default=0) else 0
        dtype = output_dtype(recipe, step.dtype)
        return step._replace(dtype=dtype, through=through, rank=rank)
    code = stored_as(step.shape, COMPRESSED[recipe.dtype], through)
    scale = scale_name(step.name) if code in CODES else ""
    return step._replace(dtype=code, scale=scale, through=through)


def _mllm_view(pair: Pair) -> View:
    return View(0, identity_parts(pair.mllm, pair.shape))


def is_table(pair: Pair, mllm: Checkpoint, other: Checkpoint) -> bool:
    """Whether a pair holds indices or masks on both sides, such as a routing table: no numbers."""
    if mllm.tensors[pair.mllm].dtype not in TABLES:
        return False
    return all(other.tensors[part.name].dtype in TABLES for part in pair.parts)


def view_of(
    source: int, pair: Pair, vocabulary: Mapping[str, RowMap], checkpoint: Checkpoint
) -> View:
    """How source number `source` fills the tensor of a pair.

    Raises:
        AlignmentError: a LoRA adapter changes, or a prior compresses, a tensor that the mllm stores
            otherwise.
    """
    is_whole = is_identity(pair.parts, pair.shape)
    rows = vocabulary.get(pair.canonical)
    is_mapped = rows is not None and not rows.is_identity
    if not (is_mapped or checkpoint.adapters or checkpoint.scales or checkpoint.factors):
        return View(source, pair.parts, is_identity=is_whole)
    changed = [part.name for part in pair.parts if part.name in checkpoint.adapters]
    if changed and (is_mapped or not is_whole):
        how = "whose rows are matched by token" if is_mapped else "which the mllm stores otherwise"
        raise AlignmentError(
            f"{checkpoint.source.given} adapts {changed[0]}, {how} (as {pair.mllm}).",
            remedy=merge_by_peft(checkpoint.source.given, read_fields(checkpoint.source)),
        )
    if is_mapped:
        return View(source, pair.parts, rows, is_identity=False)
    if changed:
        return View(source, pair.parts, is_identity=False, adapter=checkpoint.adapters[changed[0]])
    scaled = [part.name for part in pair.parts if part.name in checkpoint.scales]
    factored = [part.name for part in pair.parts if part.name in checkpoint.factors]
    if (scaled or factored) and not is_whole:
        raise AlignmentError(
            f"{checkpoint.source.given} compresses {(scaled + factored)[0]}, which the mllm stores "
            "otherwise.",
            remedy="Compute the prior again for this mllm, or without compression.",
        )
    if factored:
        found = checkpoint.factors[factored[0]]
        return View(source, pair.parts, is_identity=False, factors=found)
    scale = checkpoint.scales[scaled[0]] if scaled else ""
    return View(source, pair.parts, is_identity=is_whole, scale=scale)
