"""Recipes as files: our own YAML, mergekit's YAML, and the manifest of any output.

Whatever the format, a file becomes a mapping of option names to values, which flags may override,
and that becomes a `Recipe`: every rule is the recipe's own, every error that of the command line.
"""

import os
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from drift_merge.errors import RecipeError, nearest
from drift_merge.recipes.recipe import Recipe
from drift_merge.recipes.values import RUNNING, Methods, build_recipe, known_keys
from drift_merge.recipes.yaml import Entries, read_json, read_mapping

if TYPE_CHECKING:
    from drift_merge.recipes.remade import Remade

PATHS = (
    "output",
    "map",
    "gates",
    "reasoner",
    "mllm",
    "base",
)  # relative to the file, where they exist
MANIFESTS = ("drift_merge.json", "prior.json")


@dataclass(frozen=True, slots=True)
class LoadedRecipe:
    """What a file asks for: options by long name, and where each comes from."""

    file: Path
    values: dict[str, Any]  # `method`, `reasoner`, ..., and the keys of RUNNING
    lines: Mapping[str, int] = field(default_factory=dict)  # of the keys, where known
    remade: "Remade | None" = None  # what a manifest says beside its options
    notes: tuple[str, ...] = ()  # what a user should know of how the file was understood
    own: Methods = field(default_factory=dict)  # methods of the user's own

    def recipe(self, overrides: Mapping[str, Any] | None = None) -> Recipe:
        """The recipe; values of `overrides` win over the file's.

        Raises:
            RecipeError: naming the file, and the line where one key is at fault.
            SourceError: a local source of a manifest is not there.
        """
        given = dict(overrides or {})
        values = {k: v for k, v in (self.values | given).items() if k not in RUNNING}
        if self.remade is not None:
            from drift_merge.recipes.remade import require_sources

            require_sources(self.remade, values, self.file)
        try:
            return build_recipe(values, self.own)
        except RecipeError as error:
            where = self._place([key for key in values if key not in given], error.message)
            raise RecipeError(f"{where}: {error.message}", remedy=error.remedy) from error

    def _place(self, keys: Sequence[str], message: str) -> str:
        """The file, and the line of the key that a message speaks of first."""
        found = [
            (match.start(), self.lines[key])
            for key in keys
            if key in self.lines
            and (match := re.search(rf"(?<![\w-])(?:--)?{re.escape(key)}(?![\w-])", message))
        ]
        return f"{self.file}, line {min(found)[1]}" if found else str(self.file)


def read_recipe(file: Path, own: Methods | None = None) -> LoadedRecipe:
    """Read a recipe of any of the three formats; a directory stands for the manifest in it.

    Args:
        file: YAML or manifest.
        own: methods of a user's own, by name.

    Raises:
        RecipeError: unreadable, an unknown key, or something of mergekit's that is not supported.
        CheckpointError: a manifest that is broken, or of a newer format.
    """
    manifest = _manifest_file(file)
    content = read_json(manifest) if manifest else None
    if manifest is not None and content is not None and "kind" in content:
        from drift_merge.recipes.remade import read_remade

        remade = read_remade(manifest, content["kind"], own or {})
        return LoadedRecipe(manifest, remade.values, remade=remade, own=own or {})
    entries = read_mapping(file)
    if "merge_method" in entries:
        from drift_merge.recipes.mergekit.translate import translate

        values, notes = translate(entries, file, lambda text: str(_resolve(file, "mllm", text)))
        return LoadedRecipe(file, values, notes=notes)
    return _read_ours(file, entries, own or {})


def _read_ours(file: Path, entries: Entries, own: Methods) -> LoadedRecipe:
    values = {key.replace("_", "-"): value for key, value in entries.items()}
    lines = {key.replace("_", "-"): line for key, line in entries.lines.items()}
    refuse_unknown(values, known_keys(own), file, lines)
    given = {key: value for key, value in values.items() if value is not None}
    resolved = {key: _resolve(file, key, v) for key, v in given.items()}
    return LoadedRecipe(file, resolved, lines, own=own)


def _manifest_file(file: Path) -> Path | None:
    """The manifest that a file or a directory may be."""
    if not file.is_dir():
        return file
    return next((file / name for name in MANIFESTS if (file / name).is_file()), None)


def _resolve(file: Path, key: str, value: Any) -> Any:
    """A path beside the file, where it exists there; Hub ids and other values as they are."""
    if isinstance(value, list) and key in PATHS:
        return [_resolve(file, key, item) for item in value]
    if key not in PATHS or not isinstance(value, str):
        return value
    beside = str(file.parent / os.path.expanduser(value))
    return beside if os.path.exists(beside) or key == "output" else value


def refuse_unknown(
    values: Collection[str], known: Collection[str], file: Path, lines: Mapping[str, int]
) -> None:
    """Refuse a key that nothing knows, with the nearest that is known.

    Raises:
        RecipeError: naming file, line and key.
    """
    for key in values:
        if key not in known:
            where = f"{file}, line {lines[key]}" if key in lines else str(file)
            raise RecipeError(
                f"{where}: unknown key {key!r}.{nearest(key, known)}",
                remedy=f"Known keys: {', '.join(known)}",
            )


def absolute(values: Mapping[str, Any]) -> dict[str, Any]:
    """The same with absolute paths, so that a recipe can be run from anywhere."""

    def one(key: str, value: Any) -> Any:
        if isinstance(value, list):
            return [one(key, item) for item in value]
        path = os.path.expanduser(value)
        return os.path.abspath(path) if key == "output" or os.path.exists(path) else value

    return {key: one(key, value) if key in PATHS else value for key, value in values.items()}
