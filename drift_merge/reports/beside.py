"""The picture beside the card of an artifact: the one that `report` has written, or drawn now."""

from pathlib import Path

from drift_merge.merges.manifest import Merge
from drift_merge.priors.manifest import Prior
from drift_merge.reports.figures import of_prior
from drift_merge.reports.pictures import has_matplotlib, heat_maps

PRIOR_PNG, MERGE_PNG = "prior.png", "merge.png"


def prior_picture(prior: Prior) -> tuple[str, bytes | None]:
    """Name and content of a prior's picture; drawn from its manifest where it is not there yet.

    None where it is not there and matplotlib is not installed.
    """
    found = _read(prior.path / PRIOR_PNG)
    if found is None and has_matplotlib():
        found = draw_prior(prior)
    return PRIOR_PNG, found


def draw_prior(prior: Prior) -> bytes:
    """Relative norm and cosine by layer and module.

    Raises:
        RecipeError: matplotlib is not installed.
    """
    sources = prior.manifest["sources"]
    title = f"Prior: {sources['reasoner']['label']} to {sources['mllm']['label']}"
    return heat_maps(of_prior(prior.tensors), title=title)


def merge_picture(merge: Merge) -> tuple[str, bytes | None]:
    """Name and content of a merge's picture, which `report` measures; None where it is not there.

    In the mllm's folder there may be a file of this name, which is carried over: it is not ours.
    """
    is_carried = MERGE_PNG in merge.manifest.get("sidecars", {})
    return MERGE_PNG, None if is_carried else _read(merge.path / MERGE_PNG)


def _read(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None
