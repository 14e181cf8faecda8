"""Verify an artifact: its files against its manifest, a sample of it against its sources."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypedDict

from drift_merge.artifacts.checks import VerifyReport, check_files, check_sample
from drift_merge.errors import RecipeError
from drift_merge.plans.prepare import prepare
from drift_merge.recipes.own_methods import load_methods
from drift_merge.recipes.recipe import Recipe
from drift_merge.recipes.remade import own_method_of
from drift_merge.recipes.words import DEFAULT_CACHE_SIZE
from drift_merge.storage.manifests import check_beside, check_seal
from drift_merge.storage.measured import StoredKey, TensorRecord
from drift_merge.storage.ranks.meeting import ALONE, Ranks


@dataclass(frozen=True, slots=True)
class Artifact:
    """A prior or a merge on disk, opened by its manifest; no tensor data is read."""

    path: Path
    manifest: dict[str, Any]

    @property
    def tensors(self) -> dict[str, TensorRecord]:
        """What is recorded of every tensor, by its name in the shards."""
        tensors: dict[str, TensorRecord] = self.manifest["tensors"]
        return tensors


class Checking(TypedDict, total=False):
    """How a check is made; see `verify`."""

    sample: int
    seed: int
    threads: int
    stream: bool
    cache_limit: str
    progress: Callable[[int], None]
    ranks: Ranks


@dataclass(frozen=True, slots=True, kw_only=True)
class GivenSources:
    """The sources that a user has named for a sample to be computed again; perhaps none."""

    reasoners: Sequence[str]
    mllm: str | None
    base: str | None
    map_file: Path | None = None  # the `--map` that was used, if one was
    methods_file: Path | None = None  # the Python file with the method, if it was a user's own

    def require_all(self, manifest: dict[str, Any]) -> None:
        """Refuse some of the sources of a manifest without the others.

        Raises:
            RecipeError: says which are needed.
        """
        sources = manifest["sources"]
        count = len(sources.get("reasoners", ("one",)))
        needs_base = "base" in sources
        if self.mllm and len(self.reasoners) == count and needs_base == (self.base is not None):
            return
        reasoners = "--reasoner" if count == 1 else f"{count} --reasoner"
        wanted = f"{reasoners}, --mllm and --base" if needs_base else f"{reasoners} and --mllm"
        raise RecipeError(
            f"To compute tensors of it again, {wanted} are needed together.",
            remedy="Give them all, or none to check the files alone.",
        )


def verify(
    artifact: Artifact,
    file: str,
    fingerprint_key: StoredKey,
    method: str,
    given: GivenSources,
    *,
    sample: int = 8,
    seed: int = 0,
    threads: int = 1,
    stream: bool = False,
    cache_limit: str = DEFAULT_CACHE_SIZE,
    progress: Callable[[int], None] = lambda _: None,
    ranks: Ranks = ALONE,
) -> VerifyReport:
    """Check an artifact.

    Args:
        artifact: opened.
        file: name of its manifest.
        fingerprint_key: which entry of a tensor is the fingerprint of its stored bytes.
        method: of the recipe.
        given: sources; with them a sample of tensors is computed again.
        sample: number of tensors to compute again.
        seed: of the sample.
        threads: readers.
        stream: fetch of Hub sources only what the sample needs, and delete it.
        cache_limit: such as "20GB": disk for what lies here at a time.
        progress: called with the bytes read.
        ranks: the processes that share the work; all take the same seed.

    Raises:
        VerificationError: naming the first bad tensor or file; the card may be edited.
        RecipeError: only some of the sources are given.
    """
    path, manifest = artifact.path, artifact.manifest
    check_seal(manifest, path / file)
    check_beside(
        path,
        manifest.get("sidecars", {}),  # of a merge
        remedy="Copy it from the mllm again, or keep the change and do not verify it.",
    )
    check_beside(path, manifest["index"], remedy="Make or download the directory again.")
    report = check_files(
        path, manifest, fingerprint_key, threads=threads, progress=progress, ranks=ranks
    )
    if not given.reasoners and given.mllm is None and given.base is None:
        return report
    given.require_all(manifest)
    recipe = Recipe.from_parameters(
        method,
        manifest["parameters"],
        reasoners=given.reasoners,
        mllm=str(given.mllm),
        base=given.base,
        map_file=given.map_file,
        own_method=own_method_of(path / file, manifest, load_methods(given.methods_file)),
    )
    plan = prepare(recipe, stream=stream, quiet=True).plan()
    names, near = check_sample(
        plan,
        artifact.tensors,
        fingerprint_key,
        sample=sample,
        seed=seed,
        cache_limit=cache_limit,
        directory=path,
        ranks=ranks,
    )
    return replace(report, recomputed=names, near=near)
