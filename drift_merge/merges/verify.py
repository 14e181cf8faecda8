"""Verify a merge; see `artifacts.verify`."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from drift_merge.artifacts.checks import VerifyReport
from drift_merge.artifacts.verify import Checking, GivenSources, verify
from drift_merge.errors import VerificationError
from drift_merge.merges.manifest import MANIFEST, Merge

if TYPE_CHECKING:
    from typing_extensions import Unpack


def verify_merge(
    merge: Merge,
    *,
    reasoners: Sequence[str] = (),
    mllm: str | None = None,
    base: str | None = None,
    map_file: Path | None = None,
    methods_file: Path | None = None,
    **how: "Unpack[Checking]",
) -> VerifyReport:
    """Check a merge: weights and sidecars, and with its sources a sample of its tensors.

    Args:
        merge: opened.
        reasoners: sources in their order; the rest as in `priors.verify.verify_prior`.
        mllm: source.
        base: source.
        map_file: the `--map` that was used, if one was.
        methods_file: the Python file with the method, if it was a user's own.
        how: sample, seed, threads, stream, cache_limit and progress.

    Raises:
        VerificationError, RecipeError: as there.
    """
    given = GivenSources(
        reasoners=reasoners, mllm=mllm, base=base, map_file=map_file, methods_file=methods_file
    )
    _require_one_result(merge)
    return verify(merge, MANIFEST, "fingerprint", merge.manifest["method"], given, **how)


def _require_one_result(merge: Merge) -> None:
    """A parameter that is stored under several names has the same bytes under each."""
    for name, record in merge.tensors.items():
        first = record.get("second_name_of", name)
        if first == name:
            continue
        if merge.tensors.get(first, {}).get("fingerprint") != record.get("fingerprint"):
            raise VerificationError(
                f"{name} is a second name of {first}, but its fingerprint is another one.",
                remedy="Make it again from its sources.",
            )
