"""Compress a prior on disk: the same deltas in 8 bits with a scale per row, or by factors.

From a float32 prior this gives the bytes that computing a compressed prior gives; from a
narrower one, those of computing it through that dtype (`--through`), which is how the manifest
says it, so that a compressed prior can be checked against its sources like any other.
"""

from pathlib import Path
from typing import Any

from drift_merge.artifacts.describe import describe_index
from drift_merge.engine.job import RunOptions, execute
from drift_merge.errors import RecipeError, VerificationError, one_of
from drift_merge.names.tensors import identity_parts
from drift_merge.plans.plan import Plan, Step, View, build_plan
from drift_merge.plans.prior import PRIOR_METADATA
from drift_merge.plans.views import store_as
from drift_merge.priors.card import prior_card
from drift_merge.priors.compute import ComputedPrior
from drift_merge.priors.manifest import (
    MANIFEST,
    Prior,
    matrices_of,
    of_delta,
    open_prior,
    open_shards,
    stored_form,
)
from drift_merge.recipes.recipe import Recipe
from drift_merge.recipes.words import DEFAULT_SHARD_SIZE, NORMS, PRIOR, PRIOR_DTYPE
from drift_merge.storage import fingerprints
from drift_merge.storage.forms.compressed import COMPRESSED
from drift_merge.storage.manifests import check_beside, check_seal, describe_tool, seal, to_json
from drift_merge.storage.measured import Results
from drift_merge.storage.output import OutputDirectory

_EXACT = "float32"  # the dtype of the arithmetic: passing through it changes nothing


def compress_recipe(
    prior: Prior,
    *,
    dtype: str | None = None,
    rank: int = 0,
    norm: str = NORMS[0],
    max_shard_size: str = DEFAULT_SHARD_SIZE,
) -> Recipe:
    """The recipe that would compute the compressed prior from the sources of `prior`.

    Args:
        prior: opened; float32, bfloat16, float16 or of its mllm's dtypes.
        dtype: a key of `COMPRESSED`; with a rank that of the factors, bfloat16 by default.
        rank: of the factors; 0 for none.
        norm: which norm of delta the factors take on.
        max_shard_size: such as "5GB".

    Raises:
        RecipeError: nothing is compressed, or the prior is compressed already, or holds NaN or
            Inf.
        VerificationError: the manifest was changed after it was written.
    """
    if rank < 1:
        one_of("--dtype", dtype or "", list(COMPRESSED), "Choose one of them, or give --rank K.")
    wanted = dtype or PRIOR_DTYPE
    check_seal(prior.manifest, prior.path / MANIFEST)
    parameters, sources = prior.manifest["parameters"], prior.manifest["sources"]
    if parameters["dtype"] in COMPRESSED or parameters.get("rank"):
        was = f"rank {parameters['rank']}" if parameters.get("rank") else parameters["dtype"]
        raise RecipeError(
            f"{prior.path} is compressed already ({was}), and what is lost cannot be had back.",
            remedy="Compress the prior that it was made from, or compute it again with "
            "drift-prior compute REASONER MLLM "
            f"{f'--rank {rank}' if rank else f'--dtype {wanted}'} -o OUT",
        )
    bad = [name for name, entry in prior.tensors.items() if "nonfinite" in entry]
    if bad:
        raise RecipeError(
            f"{prior.path} holds NaN or Inf ({bad[0]}), which cannot be compressed.",
            remedy="Compute a prior of sound checkpoints, without --allow-nonfinite.",
        )
    before = parameters["dtype"]
    changed = {
        "dtype": wanted,
        "rank": rank,
        "norm": norm,
        "through": None if before == _EXACT else before,
        "max_shard_size": max_shard_size,
        "allow_nonfinite": False,
    }
    return Recipe.from_parameters(
        PRIOR,
        {**parameters, **changed},
        reasoners=[sources["reasoner"]["source"]],
        mllm=sources["mllm"]["source"],
        base=sources["base"]["source"] if "base" in sources else None,
    )


def plan_compression(prior: Prior, recipe: Recipe) -> Plan:
    """Plan the compression of every tensor of a prior, from its headers.

    Args:
        prior: opened.
        recipe: of `compress_recipe`.

    Raises:
        CheckpointError: a shard is missing or broken, or differs from the manifest.
        VerificationError: the index was changed.
    """
    check_beside(
        prior.path, prior.manifest["index"], remedy="Make or download the directory again."
    )
    deltas = open_shards(prior)
    steps = []
    for name, entry in prior.tensors.items():
        info = deltas.tensors[name]
        view = View(0, identity_parts(name, info.shape))
        module = str(entry["module"])
        step = Step(name, "cast", info.dtype, info.shape, (view,), module=module, canonical=name)
        matrices = matrices_of(name, entry, prior) if recipe.rank else ()
        steps.append(store_as(recipe, step._replace(matrices=matrices)))
    return build_plan(recipe, (deltas,), steps, "prior", PRIOR_METADATA)


def compress_prior(prior: Prior, plan: Plan, out: Path, options: RunOptions) -> ComputedPrior:
    """Write the compressed prior to `out`; every byte that is read is checked on the way.

    Args:
        prior: opened.
        plan: of `plan_compression`.
        out: directory to create.
        options: threads, device, overwrite, progress.

    Raises:
        VerificationError: a tensor is not what the manifest says; nothing is published.
        OutputError: `out` exists, clashes with the prior, or cannot be written.
        CheckpointError: a value does not fit.
    """

    def finish(output: OutputDirectory, results: Results) -> None:
        _check_inputs(prior, results)
        manifest = _manifest(prior, plan, results)
        output.write_file("README.md", prior_card(manifest))
        output.write_file(MANIFEST, to_json(manifest))

    outcome = execute(plan, out, options, finish)
    return ComputedPrior(open_prior(out), outcome)


def _check_inputs(prior: Prior, results: Results) -> None:
    for name, entry in prior.tensors.items():
        found = results[name]["fingerprint_mllm"]  # of the first input: the delta that was read
        if found != entry["fingerprint_delta"]:
            raise VerificationError(
                f"{name} in {prior.path} differs from its fingerprint: expected "
                f"{entry['fingerprint_delta']}, got {found}.",
                remedy="It was changed or damaged after it was written: make or download it again.",
            )


def _manifest(prior: Prior, plan: Plan, results: Results) -> dict[str, Any]:
    """The manifest of the prior, with what compression has changed."""
    before = prior.manifest
    tensors = {}
    for step in plan.steps:
        record = prior.tensors[step.name].copy()
        record["dtype"] = step.dtype
        record.update(stored_form(step))
        measured = of_delta(results[step.name])
        del measured["fingerprint_mllm"]  # of the first input, which is the delta itself
        record.update(measured)
        tensors[step.name] = record
    data = {name: entry["fingerprint_delta"] for name, entry in prior.tensors.items()}
    changed = {
        "tool": describe_tool(),
        "parameters": plan.recipe.parameters() | {"map_file": before["parameters"]["map_file"]},
        "compressed_from": {
            "dtype": before["parameters"]["dtype"],
            "tool": before["tool"],
            "data": fingerprints.of_fingerprints(data),
        },
        "size_bytes": plan.write_bytes,
        "shards": [shard.file for shard in plan.layout.shards],
        "index": describe_index(plan),
    }
    kept = {key: value for key, value in before.items() if key not in ("seal", "tensors")}
    return seal(kept | changed | {"tensors": tensors})
