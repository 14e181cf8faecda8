"""What several commands answer: what was made, of what, and what to do next."""

import shlex
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

from drift_merge.cli import render
from drift_merge.cli.entry import print_json
from drift_merge.cli.running import CommandOptions
from drift_merge.cli.traffic import say_traffic, traffic_json
from drift_merge.engine.job import Outcome
from drift_merge.merges.card import show_weight
from drift_merge.merges.make import MadeMerge
from drift_merge.plans.plan import Plan
from drift_merge.recipes.options import recipe_options
from drift_merge.recipes.recipe import Recipe
from drift_merge.storage import sizes

# Below this stable rank, relative to their number, most directions of a matrix are noise.
NOISE_SHARE = 0.1


def describe_merge(made: MadeMerge, plan: Plan, out: Path, run: CommandOptions) -> None:
    """Say what a merge is and what was done."""
    manifest = made.merge.manifest
    if run.as_json:
        print_made(out, manifest, made.outcome)
        return
    _say_rounding(manifest)
    _say_noise(manifest)
    if run.quiet:
        print(out)
        return
    print_merge(manifest)
    _say_nonfinite(manifest)
    say_done(out, plan, made.outcome)
    render.note(f"Next: drift-merge verify {shlex.quote(str(out))}")


def print_made(out: Path, manifest: Mapping[str, Any], outcome: Outcome) -> None:
    """One JSON object: the output, its manifest without tensors, and what was fetched."""
    made = {"schema": 1, "output": str(out), **without_tensors(manifest)}
    print_json(made | traffic_json(outcome))


def say_done(out: Path, plan: Plan, outcome: Outcome) -> None:
    """What a run did, on stderr, and the output's path on stdout."""
    if outcome.was_published:
        render.note("It had been finished by an earlier run of the same command.")
    elif outcome.num_resumed:
        render.note(f"Resumed: {outcome.num_resumed:,} tensors were done by an earlier run.")
    say_traffic(outcome)
    render.note(
        f"Wrote and verified {len(plan.steps):,} tensors, {sizes.size(plan.write_bytes)}, "
        f"in {outcome.seconds:.1f} s."
    )
    print(out)


def print_merge(manifest: Mapping[str, Any]) -> None:
    """The formula, the sources with their weights, and what was done to how many tensors."""

    sources = manifest["sources"]
    print(manifest["formula"])
    listed = [("mllm", sources["mllm"]), *(("reasoner", s) for s in sources["reasoners"])]
    listed += [("base", sources["base"])] if "base" in sources else []
    rows = [[role, s["label"], show_weight(s.get("weight"))] for role, s in listed]
    render.table(["role", "source", "weight"], rows)
    counts = ", ".join(f"{n:,} {method}" for method, n in manifest["counts"].items())
    print(f"Modules {manifest['parameters']['modules']}; tensors: {counts}")


def _say_rounding(manifest: Mapping[str, Any]) -> None:
    """Warn when the output dtype has swallowed a part of the merge."""
    kept = manifest["change_kept"]
    if kept is not None and abs(kept - 1.0) > 0.1:
        render.note(
            f"Warning [rounding]: the output dtype keeps {kept:.0%} of the change, so that the "
            "effective weights are that much smaller (measured on a sample of every tensor).\n"
            "  To keep it on average, with noise: --round stochastic. To keep all: --dtype float32"
        )


def _say_noise(manifest: Mapping[str, Any]) -> None:
    """Warn when a method has given most of its weight to directions that hold nothing."""
    seen = [
        record["stable_rank"] / min(prod(record["shape"][:-1]), record["shape"][-1])
        for record in manifest["tensors"].values()
        if "stable_rank" in record
    ]
    small = [share for share in seen if share < NOISE_SHARE]
    if small:
        render.note(
            f"Warning [noise]: {manifest['method']} gives all singular directions equal weight, "
            f"but {len(small):,} of {len(seen):,} tensors have a stable rank below "
            f"{NOISE_SHARE:.0%} of their directions: the others are mostly noise.\n"
            "  Compare with: drift-merge tsv-m, or task-arithmetic --rank 16"
        )


def _say_nonfinite(manifest: Mapping[str, Any]) -> None:
    """Count what was copied though it is no number: clip bounds, or damage of the mllm's own."""
    copied = [
        sum(entry["nonfinite"].values())
        for entry in manifest["tensors"].values()
        if entry["method"] in ("copy", "cast") and "nonfinite" in entry
    ]
    if copied:
        render.note(
            f"Note [nonfinite]: {sum(copied):,} values of {len(copied):,} tensors are NaN or Inf "
            "in the mllm, and are copied as they are."
        )


def print_formula(manifest: Mapping[str, Any]) -> None:
    """Order and sign in words: the two mistakes that ruin a run in silence."""
    print(f"{manifest['formula']}   ({manifest['parameters']['dtype']})")
    print(manifest["sign"].partition(". ")[0] + ".")


def without_tensors(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """A manifest without its table of tensors."""
    return {key: value for key, value in manifest.items() if key != "tensors"}


def command_line(command: str, recipe: Recipe, *more: str) -> str:
    """A command on the sources of a recipe that selects what the recipe selects, to be pasted."""
    words = [*command.split(), *recipe.reasoners, recipe.mllm]
    defaults = {name: default for name, (_, default) in recipe_options(recipe.method).items()}
    for name in ("modules", "layers", "map_file", "on_mismatch"):
        value = getattr(recipe, name)
        if value is not None and value != defaults[name]:
            words += [f"--{'map' if name == 'map_file' else name.replace('_', '-')}", str(value)]
    return shlex.join([*words, *more])
