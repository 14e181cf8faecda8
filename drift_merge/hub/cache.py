"""An artifact on the Hub as a local directory: in the Hub's cache, verified once per commit."""

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from drift_merge.storage.hub.artifacts import PRIOR_MANIFEST, fetch_artifact
from drift_merge.storage.hub.faults import LIBRARY
from drift_merge.storage.sources import Source, parse_source


def fetch_prior(
    text: str, *, verify: Callable[[Path], object], quiet: bool = False
) -> tuple[Source, Path]:
    """A prior on the Hub as a directory; what is in the cache is not fetched again.

    Args:
        text: `org/name` or `org/name@revision`.
        verify: checks a directory against its manifest, or raises; called once per commit, by
            whoever fetches it first on this machine.
        quiet: no progress bars of huggingface_hub.

    Returns:
        The source, pinned to its commit, and the directory.

    Raises:
        SourceError: not there, no right, no answer, or no prior.
        CheckpointError: its manifest is broken, or the upload was not finished.
        VerificationError: it is not what its manifest says.
    """
    return fetch_verified(parse_source(text), PRIOR_MANIFEST, verify=verify, quiet=quiet)


def fetch_verified(
    source: Source, manifest: str, *, verify: Callable[[Path], object], quiet: bool = False
) -> tuple[Source, Path]:
    """Any artifact on the Hub as a directory; see `fetch_prior`."""
    from huggingface_hub import cached_assets_path, constants

    source, directory = fetch_artifact(source, manifest, quiet=quiet)
    repo = str(source.repo_id).replace("/", "--")
    place = cached_assets_path(
        LIBRARY, namespace="verified", subfolder=repo, assets_dir=constants.HF_ASSETS_CACHE
    )
    seen = place / str(source.revision)
    if not seen.exists():
        verify(directory)
        with suppress(OSError):  # a cache that is read-only: verified again next time
            seen.touch()
    return source, directory
