"""Verify a merge: weights and sidecars against its manifest, a sample against its sources."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from drift_merge.artifacts.checks import VerifyReport, check_files, check_sample
from drift_merge.errors import RecipeError
from drift_merge.merges.manifest import MANIFEST, Merge
from drift_merge.plans.prepare import prepare
from drift_merge.recipes.own_methods import load_methods
from drift_merge.recipes.recipe import Recipe
from drift_merge.recipes.remade import own_method_of
from drift_merge.recipes.words import DEFAULT_CACHE_SIZE
from drift_merge.storage.manifests import check_beside, check_seal


def verify_merge(
    merge: Merge,
    *,
    reasoners: Sequence[str] = (),
    mllm: str | None = None,
    base: str | None = None,
    map_file: Path | None = None,
    methods_file: Path | None = None,
    sample: int = 8,
    seed: int = 0,
    threads: int = 1,
    stream: bool = False,
    cache_limit: str = DEFAULT_CACHE_SIZE,
    progress: Callable[[int], None] = lambda _: None,
) -> VerifyReport:
    """Check a merged checkpoint.

    Args:
        merge: opened.
        reasoners: sources in their order; with `mllm`, a sample is computed again.
        mllm: source.
        base: source, for a merge that was made with one.
        map_file: the `--map` that was used, if one was.
        methods_file: the Python file with the method, if it was a user's own.
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
    check_seal(merge.manifest, merge.path / MANIFEST)
    check_beside(
        merge.path,
        merge.manifest["sidecars"],
        remedy="Copy it from the mllm again, or keep the change and do not verify it.",
    )
    check_beside(
        merge.path, merge.manifest["index"], remedy="Make or download the directory again."
    )
    report = check_files(
        merge.path, merge.manifest, "fingerprint", threads=threads, progress=progress
    )
    if not reasoners and mllm is None and base is None:
        return report
    expected = len(merge.manifest["sources"]["reasoners"])
    needs_base = "base" in merge.manifest["sources"]
    if mllm is None or len(reasoners) != expected or needs_base != (base is not None):
        wanted = f"--mllm and {expected} --reasoner" + (" and --base" if needs_base else "")
        raise RecipeError(
            f"To compute tensors of this merge again, {wanted} are needed.",
            remedy="Give them all, or none to check the files alone.",
        )
    recipe = Recipe.from_parameters(
        merge.manifest["method"],
        merge.manifest["parameters"],
        reasoners=reasoners,
        mllm=mllm,
        base=base,
        map_file=map_file,
        own_method=own_method_of(merge.path / MANIFEST, merge.manifest, load_methods(methods_file)),
    )
    plan = prepare(recipe, stream=stream, quiet=True).plan()
    names = check_sample(
        plan, merge.tensors, "fingerprint", sample=sample, seed=seed, cache_limit=cache_limit
    )
    return replace(report, recomputed=names)
