"""Verify a prior: its files against its manifest, a sample of it against its sources."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from drift_merge.artifacts.checks import VerifyReport, check_files, check_sample
from drift_merge.errors import RecipeError
from drift_merge.plans.prepare import prepare
from drift_merge.priors.manifest import MANIFEST, Prior
from drift_merge.recipes.recipe import Recipe
from drift_merge.recipes.words import DEFAULT_CACHE_SIZE, PRIOR
from drift_merge.storage.manifests import check_beside, check_seal


def verify_prior(
    prior: Prior,
    *,
    reasoner: str | None = None,
    mllm: str | None = None,
    base: str | None = None,
    map_file: Path | None = None,
    sample: int = 8,
    seed: int = 0,
    threads: int = 1,
    stream: bool = False,
    cache_limit: str = DEFAULT_CACHE_SIZE,
    progress: Callable[[int], None] = lambda _: None,
) -> VerifyReport:
    """Check a prior.

    Args:
        prior: opened.
        reasoner: source; with `mllm`, a sample of tensors is computed again.
        mllm: source.
        base: source, for a prior that was computed with one.
        map_file: the `--map` that was used, if one was.
        sample: number of tensors to compute again.
        seed: of the sample.
        threads: readers.
        stream: fetch of Hub sources only what the sample needs, and delete it.
        cache_limit: such as "20GB": disk for what lies here at a time.
        progress: called with the bytes read.

    Raises:
        VerificationError: naming the first bad tensor or file; the card may be edited.
        RecipeError: only some of the sources are given.
    """
    check_seal(prior.manifest, prior.path / MANIFEST)
    check_beside(
        prior.path, prior.manifest["index"], remedy="Make or download the directory again."
    )
    report = check_files(
        prior.path, prior.manifest, "fingerprint_delta", threads=threads, progress=progress
    )
    if reasoner is None and mllm is None and base is None:
        return report
    needs_base = "base" in prior.manifest["sources"]
    if reasoner is None or mllm is None or needs_base != (base is not None):
        wanted = "--reasoner, --mllm and --base" if needs_base else "--reasoner and --mllm"
        raise RecipeError(
            f"To compute tensors of this prior again, {wanted} are needed together.",
            remedy="Give them all, or none to check the files alone.",
        )
    recipe = Recipe.from_parameters(
        PRIOR,
        prior.manifest["parameters"],
        reasoners=[reasoner],
        mllm=mllm,
        base=base,
        map_file=map_file,
    )
    plan = prepare(recipe, stream=stream, quiet=True).plan()
    names = check_sample(
        plan, prior.tensors, "fingerprint_delta", sample=sample, seed=seed, cache_limit=cache_limit
    )
    return replace(report, recomputed=names)
