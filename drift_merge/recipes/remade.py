"""A manifest as a recipe: an output made again from what it says of itself."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from drift_merge.errors import CheckpointError, RecipeError, SourceError
from drift_merge.maths.methods import Method
from drift_merge.recipes.recipe import Recipe
from drift_merge.recipes.values import Methods, to_values
from drift_merge.recipes.words import PRIOR
from drift_merge.storage.manifests import read_manifest

_VERSIONS = {"drift-merge": 1, "drift-prior": 1}  # kind -> format version


@dataclass(frozen=True, slots=True)
class Remade:
    """What a manifest says of the request that it describes."""

    values: dict[str, Any]  # options by long name, sources pinned
    layouts: dict[str, str]  # fingerprint of names, dtypes and shapes by role
    local: dict[str, str]  # sources that must be on this disk: text -> role
    map_name: str | None  # name of the map that was used; the manifest does not hold it


def read_remade(file: Path, kind: object, own: Methods) -> Remade:
    """The request that made the output of a manifest.

    A source from the Hub is pinned to the commit that was used; a local one is as it was given,
    relative to the current directory.

    Raises:
        CheckpointError: the manifest is broken, of another kind, or of a newer format.
        RecipeError: its recipe is not one of this version.
    """
    if kind not in _VERSIONS:
        raise CheckpointError(
            f"{file} is of the kind {kind!r}; expected one of {', '.join(_VERSIONS)}.",
            remedy="Give a drift_merge.json, a prior.json, or a YAML recipe.",
        )
    manifest = read_manifest(file, kind=str(kind), format_version=_VERSIONS[str(kind)])
    own_method = own_method_of(file, manifest, own)
    try:
        roles = _roles(manifest["sources"])
        where = {role: _pinned(source) for role, source in roles.items()}
        parameters = dict(manifest["parameters"])
        recipe = Recipe.from_parameters(
            manifest.get("method", PRIOR),
            parameters,
            reasoners=[text for role, text in where.items() if role.startswith("reasoner")],
            mllm=where["mllm"],
            base=where.get("base"),
            own_method=own_method,
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{file} does not say how it was made ({type(error).__name__}: {error}).",
            remedy="Make or download the directory again.",
        ) from error
    return Remade(
        to_values(recipe),
        {role: source["layout"] for role, source in roles.items()},
        {where[role]: role for role, source in roles.items() if not source["repo_id"]},
        parameters.get("map_file"),
    )


def own_method_of(file: Path, manifest: Mapping[str, Any], own: Methods) -> Method | None:
    """The method of a user that made the output, from the file given again; None if built in.

    Raises:
        RecipeError: it is not given, or its text is another.
    """
    source = manifest.get("parameters", {}).get("method_source")
    if source is None:
        return None
    name = str(manifest.get("method"))
    if name not in own:
        raise RecipeError(
            f"{file} was made with a method of the user's own, {name}.",
            remedy="Give the Python file that defines it: --methods FILE",
        )
    if own[name].source != source:
        raise RecipeError(
            f"the method {name} is not the one that made {file}: its text has the fingerprint "
            f"{own[name].source}, expected {source}.",
            remedy="Give the file as it was: --methods FILE",
        )
    return own[name]


def _roles(sources: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The sources of either kind of manifest: "reasoner 1", ..., "mllm", "base"."""
    reasoners = sources["reasoners"] if "reasoners" in sources else [sources["reasoner"]]
    found = {f"reasoner {i}": source for i, source in enumerate(reasoners, start=1)}
    return found | {role: sources[role] for role in ("mllm", "base") if role in sources}


def _pinned(source: Mapping[str, Any]) -> str:
    if not source["repo_id"]:
        return str(source["source"])
    return f"{source['repo_id']}@{source['revision']}" if source["revision"] else source["repo_id"]


def require_sources(remade: Remade, values: Mapping[str, Any], file: Path) -> None:
    """Refuse a remake whose local sources or map are not there.

    Args:
        remade: of the manifest.
        values: the options that will be used; flags may have replaced sources.
        file: the manifest.

    Raises:
        SourceError: naming the source and where it was looked for.
        RecipeError: a map was used and none is given.
    """
    listed = values["reasoner"] if isinstance(values["reasoner"], list) else [values["reasoner"]]
    for text in (*listed, values["mllm"], values.get("base")):
        if text in remade.local and not os.path.exists(os.path.expanduser(text)):
            role = remade.local[text]
            raise SourceError(
                f"{file} was made with the {role} {text}, which is not there (looked at "
                f"{os.path.abspath(os.path.expanduser(text))}).",
                remedy="Run it in the directory where it was made, or say where it is now: "
                f"--{role.split()[0]} PATH",
            )
    if remade.map_name is not None and not values.get("map"):
        raise RecipeError(
            f"{file} was made with the map {remade.map_name}, of which it holds only the name.",
            remedy=f"Give that file: --map {remade.map_name}",
        )
