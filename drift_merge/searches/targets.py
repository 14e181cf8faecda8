"""Makes the model of a trial, lends it, and takes it away: one at a time, in a folder or in place.

The sources are opened and aligned once for all trials that select the same tensors.
"""

import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from drift_merge.engine.job import RunOptions
from drift_merge.merges.make import make_merge
from drift_merge.plans.plan import Plan
from drift_merge.plans.prepare import Prepared, prepare
from drift_merge.recipes.recipe import Recipe

# What the alignment depends on; recipes that agree in these share the opened sources.
_ALIGNED = ("reasoners", "mllm", "base", "modules", "layers", "map_file")


class Targets(Protocol):
    """Where the models of a search come from."""

    def made(self, recipe: Recipe, label: str) -> AbstractContextManager[Any]:
        """The model of a recipe, for as long as it is evaluated."""

    def unmerged(self, recipe: Recipe) -> AbstractContextManager[Any]:
        """The mllm as it is."""


class Sources:
    """The sources of the recipes of a search, opened once."""

    def __init__(self, *, stream: bool = False, quiet: bool = True) -> None:
        self._stream, self._quiet = stream, quiet
        self._prepared: dict[tuple[Any, ...], Prepared] = {}

    def prepared(self, recipe: Recipe) -> Prepared:
        """The opened sources of a recipe.

        Raises:
            SourceError, CheckpointError, AlignmentError, RecipeError: see `prepare`.
        """
        key = tuple(getattr(recipe, name) for name in _ALIGNED)
        if key not in self._prepared:
            self._prepared[key] = prepare(recipe, stream=self._stream, quiet=self._quiet)
        return replace(self._prepared[key], recipe=recipe)

    def plan(self, recipe: Recipe) -> tuple[Prepared, Plan]:
        """The plan of a recipe; see `prepared`."""
        prepared = self.prepared(recipe)
        return prepared, prepared.plan()


class Folders:
    """Merges as checkpoints, each in a folder that goes when it has been evaluated."""

    def __init__(self, sources: Sources, place: Path, options: RunOptions) -> None:
        self._sources, self._place, self._options = sources, place, options

    @contextmanager
    def made(self, recipe: Recipe, label: str) -> Iterator[Path]:
        """Make a merge, lend it, remove it.

        Raises:
            OutputError, CheckpointError, AlignmentError, RecipeError: it cannot be made.
        """
        out = self._place / label
        try:
            make_merge(*self._sources.plan(recipe), out, self._options)
            yield out
        finally:
            for path in (out, out.with_name(f"{out.name}.partial")):
                shutil.rmtree(path, ignore_errors=True)

    @contextmanager
    def unmerged(self, recipe: Recipe) -> Iterator[str | Path]:
        """The mllm as it is: its folder on this disk, or its id where it is only on the Hub."""
        mllm = self._sources.prepared(recipe).mllm
        yield mllm.source.given if mllm.remote or mllm.path is None else mllm.path.absolute()
