"""The control of a search: reasoners that are as far away as the real ones, in random directions.

    theta_null = origin + |reasoner - origin| z / |z|,   z ~ N(0, 1) per entry

for each tensor, with the base as origin where there is one, else the mllm: the control of
"Selective Transfer of RL Updates for Visual Reasoning" (2026), where random directions of equal
norm hurt. What a search finds with them is what it finds in noise.
"""

from dataclasses import dataclass, replace
from math import pi
from pathlib import Path

from torch import Tensor

from drift_merge.engine.job import RunOptions
from drift_merge.maths.chunks import Chunk, MethodSettings, Read, blocks
from drift_merge.maths.masks import hashes, mixed_key
from drift_merge.maths.methods.own import merge_method
from drift_merge.maths.methods.table import Method
from drift_merge.merges.make import make_merge
from drift_merge.merges.manifest import MANIFEST
from drift_merge.plans.prepare import prepare
from drift_merge.recipes.recipe import Recipe

RANDOM = "random"


@dataclass(frozen=True, slots=True)
class _Norms:
    """Squared norms over the whole tensor."""

    delta: float
    noise: float


def _noise(settings: MethodSettings, chunk: Chunk) -> Tensor:
    """Normal numbers that depend on the key and the position alone (Box and Muller 1958)."""
    numel, device = chunk.mllm.numel(), chunk.mllm.device
    first, second = (
        hashes(mixed_key(settings.key, stream), chunk.begin, numel, device).double()
        for stream in (0, 1)
    )
    # From int32 to the open interval (0, 1), and to an angle.
    radius = ((first + 2**31 + 0.5) / 2**32).log_().mul_(-2.0).sqrt_()
    return radius.mul_((second / 2**32).mul_(2.0 * pi).cos_()).to(chunk.mllm.dtype)


def _measure(read: Read, settings: MethodSettings) -> _Norms:
    delta = noise = 0.0
    for chunk in blocks(read):
        origin = chunk.mllm if chunk.base is None else chunk.base
        delta += float((chunk.reasoners[0] - origin).double().square().sum())
        noise += float(_noise(settings, chunk).double().square().sum())
    return _Norms(delta, noise)


def _combine(chunk: Chunk, state: _Norms, settings: MethodSettings) -> Tensor:
    """Origin + |reasoner - origin| z / |z|."""
    origin = chunk.mllm if chunk.base is None else chunk.base
    factor = (state.delta / state.noise) ** 0.5 if state.noise else 0.0
    return origin.add_(_noise(settings, chunk), alpha=factor)


def null_method() -> Method:
    """The row of the method that makes such a reasoner."""
    decorate = merge_method(
        base="optional",
        defaults={"seed": 0},
        reasoners=(1, 1),
        name="null-random",
        summary="as far from the origin as the reasoner, in a random direction",
        measure=_measure,
    )
    return decorate(_combine)


def make_nulls(recipe: Recipe, folder: Path, options: RunOptions, *, seed: int) -> tuple[Path, ...]:
    """A null reasoner for each reasoner of a recipe, as checkpoints in float32 below a folder.

    Args:
        recipe: of the search; its modules and layers are those that get a random direction.
        folder: where they are made, and kept for a rerun.
        options: of the engine.
        seed: of the directions.

    Raises:
        OutputError, CheckpointError, AlignmentError: one cannot be made.
    """
    found = []
    for number, reasoner in enumerate(recipe.reasoners):
        out = folder / f"null-{number + 1}"
        if not (out / MANIFEST).is_file():
            made = replace(
                recipe,
                method="null-random",
                own_method=null_method(),
                reasoners=(reasoner,),
                weights=(),
                mllm_weight=None,
                variant=None,
                options={"seed": seed + number},
                dtype="float32",  # 16 bits would round most of a small delta away
                round="nearest",
            )
            prepared = prepare(made, quiet=True)
            make_merge(prepared, prepared.plan(), out, options)
        found.append(out)
    return tuple(found)
