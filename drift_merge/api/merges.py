"""Merges from Python: merge, linear, apply, run, sweep."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from drift_merge.api.options import How, Running, Where, running_options, split, takes, text_of
from drift_merge.api.priors import make_prior
from drift_merge.hub.publish import PRIOR_KIND, locate
from drift_merge.maths.methods import METHODS, Method
from drift_merge.maths.methods.table import Value
from drift_merge.merges.apply import applied_again, apply_prior, apply_recipe
from drift_merge.merges.make import make_merge, make_merges
from drift_merge.merges.manifest import Merge
from drift_merge.plans.prepare import prepare
from drift_merge.priors.manifest import Prior, open_prior
from drift_merge.recipes.files import read_recipe
from drift_merge.recipes.options import recipe_options
from drift_merge.recipes.own_methods import load_methods
from drift_merge.recipes.recipe import Recipe
from drift_merge.recipes.sweep import output_name, parse_settings, vary
from drift_merge.recipes.words import PRIOR

if TYPE_CHECKING:
    from typing_extensions import Unpack


@takes(How, "linear")
def merge(
    method: str | Method,
    reasoners: Where | Sequence[Where],
    mllm: Where,
    output: Where,
    *,
    base: Where | None = None,
    weights: float | str | Sequence[float | str] = (),
    mllm_weight: float | str | None = None,
    variant: str | None = None,
    options: Mapping[str, Value] | None = None,
    **how: "Unpack[How]",
) -> Merge:
    """Merge reasoners into the language tower of an MLLM: a complete checkpoint in `output`.

    Args:
        method: a key of `METHODS`, or a method of your own (see `merge_method`).
        reasoners: one or several directories, `.safetensors` files or Hub ids.
        mllm: the multimodal model; everything not selected is its, byte for byte.
        output: directory to create; absent or whole, whatever happens.
        base: common ancestor, for methods on task vectors.
        weights: one for all reasoners, or one each: a number, or text as on the command line;
            (): the method's default.
        mllm_weight: of the mllm itself, likewise.
        variant: whose formula, where implementations differ; None: the paper's.
        options: of the method, such as {"density": 0.2}.
        {options}

    Returns:
        The merge, opened.

    Raises:
        SourceError, CheckpointError, AlignmentError, RecipeError, OutputError.
    """
    values, running = split(dict(how))
    values.setdefault("modules", recipe_options("linear")["modules"][1])
    listed = [reasoners] if isinstance(reasoners, str | Path) else reasoners
    given = [weights] if isinstance(weights, int | float | str) else weights
    recipe = Recipe(
        method=method if isinstance(method, str) else method.name,
        own_method=None if isinstance(method, str) else _own(method),
        reasoners=tuple(map(str, listed)),
        mllm=str(mllm),
        base=text_of(base),
        weights=tuple(given),
        mllm_weight=mllm_weight,
        variant=variant,
        options=dict(options or {}),
        **values,
    )
    return make_merged(recipe, Path(output), running)


@takes(How, "linear")
def linear(
    reasoners: Where | Sequence[Where],
    mllm: Where,
    output: Where,
    *,
    weights: float | str | Sequence[float | str] = (),
    **how: "Unpack[How]",
) -> Merge:
    """Write (1 - sum(w)) * mllm + sum(w_i * reasoner_i): `merge` by "linear".

    Args:
        reasoners: one or several directories, `.safetensors` files or Hub ids.
        mllm: the multimodal model; everything not selected is its, byte for byte.
        output: directory to create; absent or whole, whatever happens.
        weights: one per reasoner, or one for all; () means 0.1 each.
        {options}

    Raises:
        SourceError, CheckpointError, AlignmentError, RecipeError, OutputError.
    """
    return merge("linear", reasoners, mllm, output, weights=weights, **how)


@takes(How, "linear", without=("modules", "layers", "map_file", "on_mismatch"))
def apply(
    prior: Where,
    mllm: Where,
    output: Where,
    *,
    scale: float = 0.1,
    options: Mapping[str, Value] | None = None,
    **how: "Unpack[How]",
) -> Merge:
    """Write mllm + scale * delta as a complete MLLM checkpoint in `output`.

    Args:
        prior: directory or Hub id of a prior; its modules and layers are merged.
        mllm: the model that the prior was computed against; another is refused.
        output: directory to create; absent or whole, whatever happens.
        scale: factor of delta; 1 gives the reasoner's weights.
        options: of singular directions, such as {"rank": 1}; see `drift-merge guide methods`.
        {options}

    Returns:
        The merge, opened.

    Raises:
        SourceError, CheckpointError, AlignmentError, RecipeError, OutputError.
    """
    values, running = split(dict(how))
    place, path = locate(str(prior), PRIOR_KIND, quiet=not running.get("progress", True))
    manifest = open_prior(path).manifest
    recipe = apply_recipe(place, manifest, str(mllm), scale=scale, options=options, **values)
    prepared = prepare(recipe, stream=running.get("stream", False), quiet=True)
    plan = prepared.plan()
    with running_options([plan], running) as ways:
        return apply_prior(manifest, prepared, plan, Path(output), ways).merge


@takes(Running)
def run(
    recipe: Where | Recipe,
    output: Where,
    *,
    methods_file: Where | None = None,
    overrides: Mapping[str, Any] | None = None,
    **how: "Unpack[Running]",
) -> Prior | Merge:
    """Make what a recipe says: a YAML of ours or mergekit's, a manifest, or a `Recipe`.

    Args:
        recipe: file or directory as for `drift-merge run`, or a `Recipe`.
        output: directory to create; absent or whole, whatever happens.
        methods_file: Python file with merge methods of your own.
        overrides: options by their long names, in the place of the file's.
        {options}

    Raises:
        SourceError, CheckpointError, AlignmentError, RecipeError, OutputError.
    """
    if not isinstance(recipe, Recipe):
        own = load_methods(None if methods_file is None else Path(methods_file))
        recipe = read_recipe(Path(recipe), own).recipe(overrides)
    if recipe.options.get("is_delta"):
        return apply(recipe.reasoners[0], recipe.mllm, output, **applied_again(recipe), **how)
    make = make_prior if recipe.method == PRIOR else make_merged
    return make(recipe, Path(output), how)


@takes(Running)
def sweep(
    recipe: Where | Recipe,
    settings: Sequence[str],
    output: Where,
    *,
    methods_file: Where | None = None,
    **how: "Unpack[Running]",
) -> list[Merge]:
    """Make many merges of one recipe in a single pass over its inputs, below `output`.

    Args:
        recipe: file as for `drift-merge run`, or a `Recipe`.
        settings: such as ["weight=0.05:0.5:0.05", "density=0.1,0.2"]; every combination.
        output: directory of the outputs, each named for its settings.
        methods_file: Python file with merge methods of your own.
        {options}

    Returns:
        The merges, opened, in the order of the settings.

    Raises:
        SourceError, CheckpointError, AlignmentError, RecipeError, OutputError.
    """
    if not isinstance(recipe, Recipe):
        own = load_methods(None if methods_file is None else Path(methods_file))
        recipe = read_recipe(Path(recipe), own).recipe()
    prepared = prepare(recipe, stream=how.get("stream", False), quiet=not how.get("progress", True))
    jobs = []
    for setting in parse_settings(settings):
        varied = replace(prepared, recipe=vary(recipe, dict(setting)))
        jobs.append((varied, varied.plan(), Path(output) / output_name(setting)))
    with running_options([plan for _, plan, _ in jobs], how) as options:
        return [made.merge for made in make_merges(jobs, options)]


def make_merged(recipe: Recipe, output: Path, how: Running) -> Merge:
    """Make the merge of a recipe."""
    prepared = prepare(recipe, stream=how.get("stream", False), quiet=not how.get("progress", True))
    plan = prepared.plan()
    with running_options([plan], how) as options:
        return make_merge(prepared, plan, output, options).merge


def _own(method: Method) -> Method | None:
    return None if METHODS.get(method.name) is method else method
