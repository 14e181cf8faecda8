"""Searches from Python: the objective is a function of a directory, or of a live model."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from drift_merge.api.options import Running, Where, running_options, takes
from drift_merge.errors import EvaluationError
from drift_merge.evaluation.scores import Scores, number
from drift_merge.recipes.files import LoadedRecipe, read_recipe
from drift_merge.recipes.own_methods import load_methods
from drift_merge.recipes.recipe import Recipe
from drift_merge.recipes.values import to_values
from drift_merge.searches.request import Evaluate
from drift_merge.searches.start import SearchOptions, space_of, start_search

if TYPE_CHECKING:
    from torch import nn
    from typing_extensions import Unpack

Result = float | Mapping[str, float] | Scores
Objective = Callable[..., Result]  # (model) or, with rungs, (model, limit)


@takes(Running)
def search(
    recipe: Where | Recipe,
    space: Sequence[str],
    objective: Objective,
    *,
    output: Where | None = None,
    model: "nn.Module | None" = None,
    final: Objective | None = None,
    metrics: Sequence[str] = ("score",),
    minimize: Sequence[str] = (),
    trials: int = 20,
    rungs: Sequence[str | int] = (),
    sampler: str | None = None,
    seed: int = 0,
    storage: str | None = None,
    study: str | None = None,
    scratch: Where | None = None,
    null: str | None = None,
    methods_file: Where | None = None,
    **how: "Unpack[Running]",
) -> dict[str, Any]:
    """Search the options of a recipe that an objective likes best; see `drift-merge guide search`.

    Args:
        recipe: file as for `drift-merge run`, or a `Recipe`.
        space: such as ["weight=0.01:0.3:log", "method=linear,ties"].
        objective: from the directory of a merge (or `model`) to a number, to a dictionary with one
            for each of `metrics`, or to `Scores`; with `rungs` it takes the limit too.
        output: directory of the best merge; beside it is OUT.search with the study. None: neither
            is kept.
        model: the mllm, loaded; it is patched in place to be each merge, and put back.
        final: an objective on held-out items, for the best, the mllm and the default alone.
        metrics: names.
        minimize: those that are better when low.
        trials: of the whole study.
        rungs: limits; the worse trials stop early.
        sampler: tpe, nsga2, random or grid; None: by the space.
        seed: of the sampler.
        storage: URL of a database that several processes share.
        study: name in it.
        scratch: where merges are tried.
        null: "random": reasoners in random directions, as a control.
        methods_file: Python file with merge methods of your own.
        {options}

    Returns:
        The content of `search.json`.

    Raises:
        RecipeError: the space cannot be read, Optuna is missing, or the study is another's.
        EvaluationError: the unmerged mllm has no score, or no trial has.
        SourceError, CheckpointError, AlignmentError, OutputError: as for `run`.
    """
    own = load_methods(None if methods_file is None else Path(methods_file))
    if isinstance(recipe, Recipe):
        if recipe.own_method is not None:
            own = {**own, recipe.method: recipe.own_method}
        loaded = LoadedRecipe(Path("recipe"), to_values(recipe), own=own)
    else:
        loaded = read_recipe(Path(recipe), own)
    found, whole = space_of(loaded, space)
    options = SearchOptions(
        metrics=tuple(metrics),
        minimize=tuple(minimize),
        trials=trials,
        rungs=tuple(map(str, rungs)),
        sampler=sampler,
        seed=seed,
        storage=storage,
        study=study,
        out=None if output is None else Path(output),
        scratch=None if scratch is None else Path(scratch),
        null=null,
        stream=how.get("stream", False),
    )
    said = print if how.pop("progress", True) else None
    described = {"evaluate": _name(objective), "final_evaluate": _name(final), "null": None}
    with running_options([], {**how, "progress": False}) as engine:
        return start_search(
            found,
            whole,
            lambda _: _evaluator(objective, options),
            None if final is None else lambda _: _evaluator(final, options),
            options,
            engine,
            described=described,
            model=model,
            say=said or (lambda _: None),
        )


def _name(objective: Objective | None) -> str | None:
    if objective is None:
        return None
    return f"{getattr(objective, '__module__', '')}.{getattr(objective, '__qualname__', 'object')}"


def _evaluator(objective: Objective, options: SearchOptions) -> Evaluate:
    def evaluate(model: Any, limit: str, _label: str) -> Scores:
        found = objective(model, limit) if options.rungs else objective(model)
        return scores_of(found, options.metrics)

    return evaluate


def scores_of(found: Result, metrics: Sequence[str]) -> Scores:
    """What an objective has returned, as scores.

    Raises:
        EvaluationError: it is no number, or not one for each metric.
    """
    if isinstance(found, Scores):
        return found
    if isinstance(found, Mapping):
        return Scores(
            {str(name): number(v, f"the objective's {name}") for name, v in found.items()}
        )
    if len(metrics) > 1:
        raise EvaluationError(
            f"the objective returned {found!r}; expected one number for each metric.",
            remedy=f"Return a dictionary with {', '.join(metrics)}.",
        )
    return Scores({metrics[0]: number(float(found), "the objective's result")})
