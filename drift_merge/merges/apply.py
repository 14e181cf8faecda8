"""Apply a prior: mllm + scale * delta, to the very mllm that delta was computed against."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from drift_merge.engine.job import Finish, Job, RunOptions, execute_all
from drift_merge.errors import AlignmentError
from drift_merge.maths.methods.table import Value
from drift_merge.merges.make import MadeMerge, finish_merge
from drift_merge.merges.manifest import open_merge
from drift_merge.plans.plan import Plan
from drift_merge.plans.prepare import Prepared
from drift_merge.recipes.recipe import Recipe
from drift_merge.storage.measured import Results
from drift_merge.storage.output import OutputDirectory

Manifest = Mapping[str, Any]  # of a prior


def apply_recipe(
    prior: str,
    manifest: Manifest,
    mllm: str,
    *,
    scale: float,
    options: Mapping[str, Value] | None = None,
    **values: Any,
) -> Recipe:
    """The recipe of mllm + scale * delta over the tensors of a prior.

    Args:
        prior: directory of the prior, or its Hub id pinned to a commit.
        manifest: its manifest.
        mllm: source of the model that the prior was computed against.
        scale: factor of delta; 1 gives the reasoner where delta = reasoner - mllm.
        options: of `inject`, beside these: rank, norm, ...
        values: other fields of the recipe (dtype, max_shard_size, allow_nonfinite).
    """
    parameters = manifest["parameters"]
    return Recipe(
        method="inject",
        reasoners=(prior,),
        mllm=mllm,
        options={**(options or {}), "scale": scale, "is_delta": True},
        modules=parameters["modules"],
        layers=parameters["layers"],
        on_mismatch=parameters["on_mismatch"],
        **values,
    )


def apply_prior(
    manifest: Manifest, prepared: Prepared, plan: Plan, out: Path, options: RunOptions
) -> MadeMerge:
    """Write mllm + scale * delta to `out`.

    Args:
        manifest: of the prior.
        prepared: of `apply_recipe`.
        plan: `prepared.plan()`.
        out: directory to create.
        options: how to run.

    Raises:
        AlignmentError: the mllm is not the one that the prior was computed against.
        OutputError, CheckpointError: see `make_merge`.
    """
    outcome = execute_all([Job(plan, out, _finish(manifest, prepared, plan))], options)[0]
    return MadeMerge(open_merge(out), outcome)


def _finish(manifest: Manifest, prepared: Prepared, plan: Plan) -> Finish:
    finish = finish_merge(prepared, plan)

    def checked(output: OutputDirectory, results: Results) -> None:
        for step in plan.steps:
            entry = manifest["tensors"].get(step.canonical)
            found = results[step.name]["fingerprint_mllm"]
            if entry is not None and found != entry["fingerprint_mllm"]:
                raise AlignmentError(
                    f"the prior was computed against another mllm: {step.name} has "
                    f"{found}, expected {entry['fingerprint_mllm']}.",
                    remedy="delta belongs to the model it was computed against: give that one, "
                    "or compute a prior for this one.",
                )
        finish(output, results)

    return checked


def applied_again(recipe: Recipe) -> dict[str, Any]:
    """What `apply_recipe` takes of a recipe that it has made, beside prior, manifest and mllm."""
    names = ("dtype", "round", "round_seed", "max_shard_size", "allow_nonfinite")
    options = {n: v for n, v in recipe.options.items() if n not in ("scale", "is_delta")}
    scale = float(recipe.options.get("scale", 0.1))
    return {"scale": scale, "options": options, **{name: getattr(recipe, name) for name in names}}
