"""Verify a merge: weights and sidecars against its manifest, a sample against its sources."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from drift_merge.engine.check import Report, check_files, check_sample
from drift_merge.engine.prepare import prepare
from drift_merge.engine.recipe import Recipe
from drift_merge.engine.seals import check_beside, check_seal
from drift_merge.errors import RecipeError
from drift_merge.merges.manifest import MANIFEST, Merge


def verify_merge(
    merge: Merge,
    *,
    reasoners: Sequence[str] = (),
    mllm: str | None = None,
    map_file: Path | None = None,
    sample: int = 8,
    seed: int = 0,
    threads: int = 1,
    progress: Callable[[int], None] = lambda _: None,
) -> Report:
    """Check a merged checkpoint.

    Args:
        merge: opened.
        reasoners: sources in their order; with `mllm`, a sample is computed again.
        mllm: source.
        map_file: the `--map` that was used, if one was.
        sample: number of tensors to compute again.
        seed: of the sample.
        threads: readers.
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
    if not reasoners and mllm is None:
        return report
    expected = len(merge.manifest["sources"]["reasoners"])
    if mllm is None or len(reasoners) != expected:
        raise RecipeError(
            f"To compute tensors of this merge again, --mllm and {expected} --reasoner are needed.",
            remedy="Give them all, or none to check the files alone.",
        )
    parameters: dict[str, Any] = merge.manifest["parameters"]
    recipe = Recipe(
        method=merge.manifest["method"],
        reasoners=tuple(reasoners),
        mllm=mllm,
        weights=tuple(parameters["weights"]),
        modules=parameters["modules"],
        layers=parameters["layers"],
        dtype=parameters["dtype"],
        on_mismatch=parameters["on_mismatch"],
        map_file=map_file,
        allow_nonfinite=parameters["allow_nonfinite"],
    )
    plan = prepare(recipe, quiet=True).plan()
    names = check_sample(plan, merge.tensors, "fingerprint", sample=sample, seed=seed)
    return replace(report, recomputed=names)
