"""Combine priors of one mllm: sums, or one without its part along another.

    sum:         delta = w_1 delta_1 + w_2 delta_2 + ...
    orthogonal:  delta = w_1 (delta_1 - c delta_2),  c = <delta_1, delta_2> / |delta_2|^2

tensor by tensor, in float32. What a tensor's record says of a reasoner is that of the first prior.
"""

from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import Any

from drift_merge.artifacts.describe import describe_index
from drift_merge.engine.job import RunOptions, execute
from drift_merge.errors import AlignmentError, RecipeError
from drift_merge.names.modules import CHOICES, ModuleSelection, classify, layer_of, parse_selection
from drift_merge.names.tensors import identity_parts
from drift_merge.plans.plan import COMBINE, Plan, Step, View, build_plan
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
from drift_merge.priors.verify import verify_prior
from drift_merge.recipes.recipe import Recipe
from drift_merge.recipes.words import NORMS, PRIOR
from drift_merge.storage.checkpoint import Checkpoint
from drift_merge.storage.manifests import describe_tool, seal, to_json
from drift_merge.storage.measured import Results
from drift_merge.storage.output import OutputDirectory

_ROWS = 512  # of a delta, looked at a time


def plan_combination(
    priors: Sequence[Prior],
    weights: Sequence[float] = (),
    *,
    orthogonal: bool = False,
    modules: str | None = None,
    layers: str | None = None,
    threads: int = 1,
    **stored: Any,
) -> Plan:
    """Plan a combination; all bytes of the priors are read and checked, for `orthogonal` twice.

    Args:
        priors: opened, of one mllm, with the same tensors as far as they are selected.
        weights: one each, not 0; 1 by default. A negative one negates.
        orthogonal: of two priors: the first without its part along the second.
        modules: as `--modules`: fewer than the first prior holds.
        layers: as `--layers`.
        threads: readers.
        stored: dtype, rank, norm, max_shard_size, as a recipe takes them.

    Raises:
        RecipeError: weights, modules or layers are of no use; a prior holds NaN or Inf.
        AlignmentError: the priors are of different mllms, or hold different tensors.
        VerificationError: a prior was changed or damaged.
    """
    used = _weights(priors, weights, orthogonal=orthogonal)
    first = priors[0]
    given = {key: value for key, value in stored.items() if value is not None}
    parameters = (
        first.manifest["parameters"] | {"through": None, "rank": 0, "norm": NORMS[0]} | given
    )
    parameters["modules"] = modules or parameters["modules"]
    chosen = _chosen(first, parameters["modules"], layers)
    if layers is not None:  # as numbers, since the prior need not hold the last layers
        numbers = {n for name in chosen if (n := layer_of(name)) is not None}
        parameters["layers"] = ",".join(map(str, sorted(numbers)))
    for prior in priors:
        _require_same(first, prior, chosen)
        verify_prior(prior, threads=threads)
    sources = tuple(open_shards(prior) for prior in priors)
    along = _along(priors, chosen) if orthogonal else {}
    source = first.manifest["sources"]
    recipe = Recipe.from_parameters(
        PRIOR,
        parameters,
        reasoners=[source["reasoner"]["source"]],
        mllm=source["mllm"]["source"],
        base=source["base"]["source"] if "base" in source else None,
    )
    steps = []
    for name in chosen:
        entry, shape = first.tensors[name], tuple(first.tensors[name]["shape"])
        views = tuple(_view(number, name, shape, each) for number, each in enumerate(sources))
        factors = (used[0], -used[0] * along[name]) if orthogonal else used
        dtype = entry.get("dtype_mllm", "F32")
        step = Step(name, COMBINE, dtype, shape, views, module=str(entry["module"]), canonical=name)
        matrices = matrices_of(name, entry, first) if recipe.rank else ()
        step = step._replace(matrices=matrices, coefficients=tuple(factors))
        steps.append(store_as(recipe, step))
    return build_plan(recipe, sources, steps, "prior", PRIOR_METADATA)


def combine_priors(
    priors: Sequence[Prior], plan: Plan, command: str, out: Path, options: RunOptions
) -> ComputedPrior:
    """Write a combination as a prior like any other.

    Args:
        priors: as planned.
        plan: of `plan_combination`.
        command: that makes it again, for the card.
        out: directory to create.
        options: threads, device, overwrite, progress.

    Raises:
        OutputError: `out` exists, clashes with a prior, or cannot be written.
        CheckpointError: a value does not fit.
    """

    def finish(output: OutputDirectory, results: Results) -> None:
        manifest = _manifest(priors, plan, command, results)
        output.write_file("README.md", prior_card(manifest))
        output.write_file(MANIFEST, to_json(manifest))

    outcome = execute(plan, out, options, finish)
    return ComputedPrior(open_prior(out), outcome)


def _weights(
    priors: Sequence[Prior], weights: Sequence[float], *, orthogonal: bool
) -> tuple[float, ...]:
    count = 1 if orthogonal else len(priors)
    if orthogonal and len(priors) != 2:
        raise RecipeError(
            f"--orthogonal takes two priors, not {len(priors)}.",
            remedy="Name the prior to keep first, then the one whose direction is taken out.",
        )
    if weights and len(weights) != count:
        raise RecipeError(
            f"{len(weights)} weights for {count} prior{'s' if count > 1 else ''}.",
            remedy="Give --weight once for each prior, in their order (one with --orthogonal).",
        )
    if 0.0 in weights:
        raise RecipeError("a weight is 0.", remedy="Leave that prior out.")
    for prior in priors:
        bad = [name for name, entry in prior.tensors.items() if "nonfinite" in entry]
        if bad:
            raise RecipeError(
                f"{prior.path} holds NaN or Inf ({bad[0]}).",
                remedy="Compute a prior of sound checkpoints, without --allow-nonfinite.",
            )
    return tuple(weights) or (1.0,) * count


def _chosen(prior: Prior, modules: str, layers: str | None) -> list[str]:
    """The tensors that are selected, all of which the prior must hold."""
    if layers is not None and "-" in layers:
        raise RecipeError(
            f"layers is {layers!r}; a prior does not say which layer is its mllm's last.",
            remedy="Count from the first layer, such as --layers 0:14",
        )
    numbers = [n for name in prior.tensors if (n := layer_of(name)) is not None]
    selection = parse_selection(modules, layers, max(numbers, default=-1) + 1)
    found = [name for name in prior.tensors if selection.takes(name)]
    missing = _missing(selection, found)
    if missing or not found:
        raise RecipeError(
            f"{prior.path} holds nothing of {missing or modules}.",
            remedy=f"See what it holds: drift-prior inspect {prior.path}",
        )
    return found


def _missing(selection: ModuleSelection, found: Sequence[str]) -> str:
    words = selection.modules - {"full"} - {classify(name) for name in found}
    layers = (selection.layers or frozenset()) - {layer_of(name) for name in found}
    listed = [w for w in CHOICES if w in words] + [f"layer {n}" for n in sorted(layers)]
    return ", ".join(listed)


def _require_same(first: Prior, other: Prior, chosen: Sequence[str]) -> None:
    for name in chosen:
        one, two = first.tensors[name], other.tensors.get(name)
        if two is None:
            raise AlignmentError(
                f"{other.path} has no delta of {name}, which {first.path} has.",
                remedy="Combine what both hold: --modules, --layers.",
            )
        if (one["fingerprint_mllm"], one["shape"]) != (two["fingerprint_mllm"], two["shape"]):
            raise AlignmentError(
                f"{first.path} and {other.path} were computed against different mllms: {name} is"
                f" {one['shape']} {one['fingerprint_mllm']} and {two['shape']}"
                f" {two['fingerprint_mllm']}.",
                remedy="Compute both against one mllm: drift-prior compute REASONER MLLM -o OUT",
            )


def _along(priors: Sequence[Prior], chosen: Sequence[str]) -> dict[str, float]:
    """<delta_1, delta_2> / |delta_2|^2 by tensor, summed in float64; 0 where delta_2 is 0."""
    # Here: it needs torch; the workspace spends torch's warning of read-only maps.
    import drift_merge.engine.workspace  # noqa: F401
    from drift_merge.priors.deltas import open_deltas

    found = {}
    with open_deltas(priors[0]) as ours, open_deltas(priors[1]) as theirs:
        for name in chosen:
            product = square = 0.0
            for begin in range(0, ours.matrix(name)[0], _ROWS):
                end = min(begin + _ROWS, ours.matrix(name)[0])
                one, two = (deltas.read(name, begin, end).double() for deltas in (ours, theirs))
                product += float((one * two).sum())
                square += float(two.square().sum())
            found[name] = product / square if square else 0.0
        ours.require_unchanged()
        theirs.require_unchanged()
    return found


def _view(number: int, name: str, shape: tuple[int, ...], shards: Checkpoint) -> View:
    parts = identity_parts(name, shape)
    if name in shards.factors:
        return View(number, parts, is_identity=False, factors=shards.factors[name])
    return View(number, parts, scale=shards.scales.get(name, ""))


def _manifest(
    priors: Sequence[Prior], plan: Plan, command: str, results: Results
) -> dict[str, Any]:
    before = priors[0].manifest
    tensors = {}
    stale = ("scale", "rank", "places", "energy", "norm_stored", "cosine_stored")
    for step in plan.steps:
        old = priors[0].tensors[step.name]
        record = {k: v for k, v in old.items() if k not in stale and k != "fingerprint_scale"}
        record.pop("fingerprint_v", None)
        measured = of_delta(results[step.name])
        for key in ("fingerprint_mllm", "fingerprint_reasoners"):  # of the deltas that were read
            measured.pop(key, None)  # type: ignore[misc]
        tensors[step.name] = record | {"dtype": step.dtype} | stored_form(step) | measured
    combined = [
        {
            "label": prior.path.name,
            "formula": prior.manifest["formula"],
            "sources": prior.manifest["sources"],
            "seal": prior.manifest.get("seal"),
        }
        for prior in priors
    ]
    terms = [f"prior_{number + 1}" for number in range(len(priors))]
    changed = {
        "formula": f"delta = {command.partition(' -o ')[0]}",
        "tool": describe_tool(),
        "parameters": plan.recipe.parameters() | {"map_file": before["parameters"]["map_file"]},
        "combined_from": dict(zip(terms, combined, strict=True)) | {"command": command},
        "coefficients": {step.name: list(step.coefficients) for step in plan.steps},
        "num_elements": sum(prod(step.shape) for step in plan.steps),
        "size_bytes": plan.write_bytes,
        "shards": [shard.file for shard in plan.layout.shards],
        "index": describe_index(plan),
    }
    drop = ("seal", "tensors", "compressed_from", "combined_from")
    kept = {key: value for key, value in before.items() if key not in drop}
    return seal(kept | changed | {"tensors": tensors})
