"""From options to a search that runs: folders, storage, models, nulls."""

import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from drift_merge.engine.job import RunOptions
from drift_merge.errors import RecipeError, nearest, one_of
from drift_merge.recipes.files import LoadedRecipe
from drift_merge.recipes.recipe import Recipe
from drift_merge.recipes.values import RUNNING, to_values
from drift_merge.searches.request import Evaluate, Search
from drift_merge.searches.run import run_search
from drift_merge.searches.selection import MAXIMIZE, MINIMIZE
from drift_merge.searches.spaces import METHOD, Space, parse_space
from drift_merge.searches.study import StudySettings, require_optuna
from drift_merge.searches.targets import Folders, Sources
from drift_merge.searches.workers import Workers

if TYPE_CHECKING:
    from torch import nn

RANDOM = "random"  # of --null
_UNNAMED = "search"


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchOptions:
    """How a search is made, beside its space and what evaluates."""

    metrics: tuple[str, ...] = ("score",)
    minimize: tuple[str, ...] = ()  # those of the metrics that are better when low
    trials: int = 20
    rungs: tuple[str, ...] = ()
    sampler: str | None = None
    seed: int = 0
    storage: str | None = None
    study: str | None = None
    out: Path | None = None
    scratch: Path | None = None
    null: str | None = None
    stream: bool = False
    quiet: bool = True  # no bars of downloads

    def settings(self) -> StudySettings:
        """Those of the study.

        Raises:
            RecipeError: one of them is not valid.
        """
        for name in self.minimize:
            if name not in self.metrics:
                raise RecipeError(
                    f"--minimize {name}: there is no such metric.{nearest(name, self.metrics)}",
                    remedy=f"The metrics: {', '.join(self.metrics)}.",
                )
        if self.null is not None:
            one_of("--null", self.null, [RANDOM])
        if self.scratch is not None and not self.scratch.is_dir():
            raise RecipeError(
                f"--scratch {self.scratch}: there is no such directory.",
                remedy="Name one that is there, such as /dev/shm",
            )
        storage = self.storage
        if storage is None and self.out is not None:
            storage = f"sqlite:///{self.folder.absolute() / 'study.db'}"
        return StudySettings(
            name=self.study or (self.out.absolute().name if self.out else _UNNAMED),
            storage=storage,
            goals=tuple(MINIMIZE if m in self.minimize else MAXIMIZE for m in self.metrics),
            sampler=self.sampler,
            seed=self.seed,
            trials=self.trials,
            rungs=self.rungs,
        )

    @property
    def folder(self) -> Path:
        """Where everything but the best merge is: beside it."""
        assert self.out is not None
        out = self.out.absolute()
        return out.with_name(f"{out.name}.search")


def space_of(loaded: LoadedRecipe, texts: Sequence[str]) -> tuple[Space, Recipe | None]:
    """The space around a recipe's file, and the recipe itself where it is whole without it.

    Raises:
        RecipeError: see `parse_space`; or the recipe is no merge.
    """
    whole: Recipe | None = None
    base = {name: value for name, value in loaded.values.items() if name not in RUNNING}
    with suppress(RecipeError):  # what it lacks may be what is varied; else the space says so
        whole = loaded.recipe()
        base = to_values(whole)
    if base.get(METHOD) == "prior" or (whole is not None and whole.options.get("is_delta")):
        raise RecipeError(
            f"{loaded.file} makes no merge of models: it cannot be searched.",
            remedy="Give a recipe with a merge method: drift-merge guide recipes",
        )
    space = parse_space(base, texts, loaded.own)
    with suppress(RecipeError):  # where methods are varied, what one lacks is left out
        whole = whole or space.recipe({})
    return space, whole


def start_search(
    space: Space,
    recipe: Recipe | None,
    evaluate: Callable[[Path], Evaluate],
    final: Callable[[Path], Evaluate] | None,
    options: SearchOptions,
    engine: RunOptions,
    *,
    described: dict[str, Any],
    model: "nn.Module | None" = None,
    say: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Run a search.

    Args:
        space: what is varied.
        recipe: the default; None if there is none.
        evaluate: from the search's folder to the function that evaluates.
        final: the same for the held-out items; None: there are none.
        options: see `SearchOptions`.
        engine: how merges are made.
        described: how it evaluates, as plain data.
        model: a live model to be patched in place; None: models are directories.
        say: called with a line on each trial.

    Returns:
        The content of `search.json`.
    """
    require_optuna()
    settings = options.settings()
    with ExitStack() as stack:
        if options.out is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="drift-search-")))
        else:
            folder = options.folder
        sources = Sources(stream=options.stream, quiet=options.quiet)
        for values in space.corners():
            sources.plan(space.recipe(values))
        scratch = options.scratch or folder / "scratch"
        workers = stack.enter_context(Workers(folder / "workers", scratch))
        if options.null is not None:
            space, recipe = _with_nulls(space, recipe, folder, workers, options, engine)
            described = {**described, "null": options.null}
        search = Search(
            space=space,
            recipe=recipe,
            metrics=options.metrics,
            settings=settings,
            evaluate=evaluate(folder),
            final=None if final is None else final(folder),
            described=described,
            folder=folder,
            out=options.out,
            overwrite=engine.overwrite,
            say=say,
        )
        targets: Any = Folders(sources, workers.place, replace(engine, overwrite=True))
        if model is not None:
            from drift_merge.searches.patching import PatchedModel

            targets = PatchedModel(model, sources, device=engine.device)
        return run_search(search, targets, sources, workers, engine)


def _with_nulls(
    space: Space,
    recipe: Recipe | None,
    folder: Path,
    workers: Workers,
    options: SearchOptions,
    engine: RunOptions,
) -> tuple[Space, Recipe | None]:
    """The same search with reasoners of random direction."""
    from drift_merge.searches.nulls import make_nulls

    for dimension in space.dimensions:
        if dimension.option in ("modules", "layers"):
            raise RecipeError(
                f"--null random cannot be used with --space {dimension.text}: the random "
                "directions are of the recipe's modules and layers.",
                remedy="Leave that space out, and write the modules into the recipe.",
            )
    first = recipe or space.recipe(space.corners()[0])
    with workers.finishing():
        nulls = make_nulls(first, folder, replace(engine, overwrite=False), seed=options.seed)
    names = [str(path) for path in nulls]
    base = {**space.base, "reasoner": names[0] if len(names) == 1 else names}
    whole = None if recipe is None else replace(recipe, reasoners=tuple(names))
    return replace(space, base=base), whole
