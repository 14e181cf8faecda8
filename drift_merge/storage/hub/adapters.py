"""LoRA adapters on the Hub: small, so they are read in the Hub's cache."""

from dataclasses import replace

from drift_merge.storage.hub.models import (
    check_arrived,
    fetch_file,
    list_files,
    resolve_revision,
)
from drift_merge.storage.sources import Source
from drift_merge.storage.weight_map import ADAPTER_CONFIG, ADAPTER_WEIGHTS


def fetch_adapter(source: Source) -> Source:
    """Download the fields and the weights of an adapter into the Hub's cache.

    Returns:
        The source, pinned, with the cache's directory as its path.

    Raises:
        SourceError: as `resolve_revision`.
        OutputError: the cache cannot be written.
    """
    source = resolve_revision(source)
    sizes = list_files(source)
    path = fetch_file(source, ADAPTER_CONFIG)
    if ADAPTER_WEIGHTS in sizes:  # if not, whoever reads it says what is wrong
        weights = fetch_file(source, ADAPTER_WEIGHTS)
        check_arrived(source, weights, ADAPTER_WEIGHTS, sizes[ADAPTER_WEIGHTS])
    return replace(source, path=path.parent)
