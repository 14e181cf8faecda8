"""Verify a prior; see `artifacts.verify`."""

from pathlib import Path
from typing import TYPE_CHECKING

from drift_merge.artifacts.checks import VerifyReport
from drift_merge.artifacts.verify import Checking, GivenSources, verify
from drift_merge.errors import RecipeError
from drift_merge.priors.manifest import MANIFEST, Prior
from drift_merge.recipes.words import PRIOR

if TYPE_CHECKING:
    from typing_extensions import Unpack


def verify_prior(
    prior: Prior,
    *,
    reasoner: str | None = None,
    mllm: str | None = None,
    base: str | None = None,
    map_file: Path | None = None,
    **how: "Unpack[Checking]",
) -> VerifyReport:
    """Check a prior: its files, and with its sources a sample of its tensors.

    Args:
        prior: opened.
        reasoner: source; with `mllm`, a sample of tensors is computed again.
        mllm: source.
        base: source, for a prior that was computed with one.
        map_file: the `--map` that was used, if one was.
        how: sample (8), seed (0), threads (1), stream (False), cache_limit ("20GB") and progress,
            as `artifacts.verify.verify` takes them.

    Raises:
        VerificationError: naming the first bad tensor or file; the card may be edited.
        RecipeError: only some of the sources are given.
    """
    is_asked = any(source is not None for source in (reasoner, mllm, base))
    if is_asked and "combined_from" in prior.manifest:
        raise RecipeError(
            f"{prior.path} is a combination of priors, which models alone do not give.",
            remedy="Check its files without --reasoner and --mllm, and each prior with its own.",
        )
    reasoners = () if reasoner is None else (reasoner,)
    given = GivenSources(reasoners=reasoners, mllm=mllm, base=base, map_file=map_file)
    return verify(prior, MANIFEST, "fingerprint_delta", PRIOR, given, **how)
