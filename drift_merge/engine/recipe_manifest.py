"""A manifest as a recipe: an output made again from what it says of itself."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from drift_merge.engine.prepare import Prepared
from drift_merge.engine.recipe import PRIOR, Recipe
from drift_merge.engine.recipe_file import Request
from drift_merge.engine.recipe_values import to_values
from drift_merge.errors import CheckpointError, RecipeError, SourceError
from drift_merge.storage import fingerprints

_KINDS = {"drift-merge": 1, "drift-prior": 1}  # kind -> format version
_FLAGS = {"mllm": "--mllm", "base": "--base"}


def read_manifest_request(file: Path) -> Request:
    """The request that made the output of a manifest, with its sources pinned.

    A source from the Hub is pinned to the commit that was used; a local one is as it was given,
    relative to the current directory. `pending` says what only the user knows.

    Raises:
        CheckpointError: the manifest is broken, of another kind, or of a newer format.
    """
    from drift_merge.engine.manifests import read_manifest

    manifest = _read(file, read_manifest)
    parameters = manifest["parameters"]
    sources = _sources(manifest)
    reasoners = [where for role, where in sources.items() if role.startswith("reasoner")]
    recipe = Recipe.from_parameters(
        manifest.get("method", PRIOR),
        parameters,
        reasoners=reasoners,
        mllm=sources["mllm"],
        base=sources.get("base"),
    )
    described = _described(manifest)
    layouts = {role: str(source.get("layout")) for role, source in described.items()}
    return Request(
        file,
        to_values(recipe),
        layouts=layouts,
        needed_map=parameters.get("map_file"),
    )
