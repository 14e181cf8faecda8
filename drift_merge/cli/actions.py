"""What the commands do: recipe, prepare, plan, execute, print. Imported when a command runs."""

import secrets
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from drift_merge.cli import render
from drift_merge.cli.entry import print_json
from drift_merge.cli.options import Run
from drift_merge.cli.planning import plan_run
from drift_merge.cli.progress import progress
from drift_merge.cli.streaming import running, say_traffic, traffic_json
from drift_merge.engine.job import Outcome
from drift_merge.engine.manifests import describe_findings
from drift_merge.engine.plan import Plan
from drift_merge.engine.prepare import prepare
from drift_merge.engine.recipe import Recipe
from drift_merge.errors import AlignmentError, RecipeError
from drift_merge.merges.make import MadeMerge
from drift_merge.names.align import require_complete
from drift_merge.names.tensors import Alignment, Finding


def align_action(
    reasoners: tuple[str, ...], mllm: str, recipe: Mapping[str, Any], *, as_json: bool
) -> int:
    """Align and print; 0 when every selected tensor is matched, else 4."""
    _one_reasoner(reasoners)
    request = Recipe(method="prior", reasoners=reasoners, mllm=mllm, **recipe)
    prepared = prepare(request, headers_only=True, quiet=True)
    alignment = prepared.reasoners[0][1]
    refusal: AlignmentError | None = None
    try:
        require_complete(alignment, on_mismatch=request.on_mismatch)
    except AlignmentError as error:
        refusal = error
    if as_json:
        print_json(_alignment_json(alignment))
        return refusal.exit_code if refusal else 0
    render.alignment_table(alignment)
    verdict = f"{alignment.num_matched:,} of {alignment.num_selected:,} selected tensors matched"
    print(
        f"{verdict}: {'REFUSED' if refusal else 'complete' if _is_full(alignment) else 'partial'}."
    )
    render.findings(alignment.findings)
    if refusal:
        raise refusal  # says which tensors, and what to do
    render.note(f"Next: drift-prior compute {shlex.join((*reasoners, mllm))} -o prior/")
    return 0


def _is_full(alignment: Alignment) -> bool:
    return alignment.num_matched == alignment.num_selected


def _alignment_json(alignment: Alignment) -> dict[str, Any]:
    def side(names: tuple[str, ...]) -> str | list[str] | None:
        return names[0] if len(names) == 1 else list(names) or None

    return {
        "schema": 1,
        "coverage": {"selected": alignment.num_selected, "matched": alignment.num_matched},
        "tensors": [
            {
                "name": record.name,
                "reasoner": side(record.reasoner),
                "mllm": side(record.mllm),
                "shape": list(record.shape) if record.shape is not None else None,
                "status": record.status,
            }
            for record in alignment.records
        ],
        "findings": describe_findings(alignment.findings),
    }


def compute_action(reasoners: tuple[str, ...], mllm: str, values: dict[str, Any], run: Run) -> None:
    """Compute a prior and print its table."""
    from drift_merge.priors.compute import compute_prior

    _one_reasoner(reasoners)
    out: Path = values.pop("output")
    recipe = Recipe(method="prior", reasoners=reasoners, mllm=mllm, **values)
    prepared, plan, transfers = plan_run(recipe, out, run)
    if run.dry_run:
        return
    with running(run, plan.write_bytes, transfers) as options:
        made = compute_prior(prepared, plan, out, options)
    manifest = made.prior.manifest
    if run.as_json:
        _print_made(out, manifest, made.outcome)
        return
    if run.quiet:
        print(out)
        return
    _print_formula(manifest)
    sentence = render.prior_table(made.prior.tensors)
    print(sentence)
    say_done(out, plan, made.outcome)
    arguments = f"--reasoner {shlex.quote(reasoners[0])} --mllm {shlex.quote(mllm)}"
    base = f" --base {shlex.quote(recipe.base)}" if recipe.base else ""
    streamed = " --stream" if run.stream else ""
    render.note(f"Next: drift-prior verify {shlex.quote(str(out))} {arguments}{base}{streamed}")


def merge_action(
    method: str, reasoners: tuple[str, ...], mllm: str, values: dict[str, Any], run: Run
) -> None:
    """Make a merged checkpoint and say what was done."""
    from drift_merge.merges.make import make_merge

    out: Path = values.pop("output")
    recipe = Recipe(method=method, reasoners=reasoners, mllm=mllm, **values)
    prepared, plan, transfers = plan_run(recipe, out, run)
    if run.dry_run:
        return
    with running(run, plan.write_bytes, transfers) as options:
        made = make_merge(prepared, plan, out, options)
    describe_merge(made, plan, out, run)


def describe_merge(made: MadeMerge, plan: Plan, out: Path, run: Run) -> None:
    """Say what a merge is and what was done."""
    manifest = made.merge.manifest
    if run.as_json:
        _print_made(out, manifest, made.outcome)
        return
    if run.quiet:
        print(out)
        return
    _print_merge(manifest)
    _say_rounding(manifest)
    say_done(out, plan, made.outcome)
    render.note(f"Next: drift-merge verify {shlex.quote(str(out))}")


def _print_made(out: Path, manifest: Mapping[str, Any], outcome: Outcome) -> None:
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
        f"Wrote and verified {len(plan.steps):,} tensors, {render.size(plan.write_bytes)}, "
        f"in {outcome.seconds:.1f} s."
    )
    print(out)


def _print_merge(manifest: Mapping[str, Any]) -> None:
    from drift_merge.merges.card import show_weight

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
            "  To keep all of it: --dtype float32"
        )


def inspect_prior_action(path: Path, *, as_json: bool) -> None:
    """Print the manifest of a prior."""
    from drift_merge.priors.manifest import open_prior

    prior = open_prior(path)
    if as_json:
        print_json({"schema": 1, **prior.manifest})
        return
    manifest = prior.manifest
    _print_formula(manifest)
    _print_sources(manifest["sources"])
    sentence = render.prior_table(prior.tensors)
    print(sentence)
    _print_size(manifest, len(prior.tensors))


def inspect_merge_action(path: Path, *, as_json: bool) -> None:
    """Print the manifest of a merge."""
    from drift_merge.merges.manifest import open_merge

    merge = open_merge(path)
    if as_json:
        print_json({"schema": 1, **merge.manifest})
        return
    _print_merge(merge.manifest)
    _print_size(merge.manifest, len(merge.tensors))


def _print_formula(manifest: Mapping[str, Any]) -> None:
    """Order and sign in words: the two mistakes that ruin a run in silence."""
    print(f"{manifest['formula']}   ({manifest['parameters']['dtype']})")
    print(manifest["sign"].partition(". ")[0] + ".")


def _print_sources(sources: Mapping[str, Mapping[str, Any]]) -> None:
    for role, source in sources.items():
        revision = f" @ {source['revision']}" if source["revision"] else ""
        print(f"{role:9} {source['repo_id'] or source['source']}{revision}")


def _print_size(manifest: Mapping[str, Any], num_tensors: int) -> None:
    print(
        f"{num_tensors:,} tensors, {render.size(manifest['size_bytes'])}, "
        f"{len(manifest['shards']):,} shard(s), made with {manifest['tool']['name']} "
        f"{manifest['tool']['version']}"
    )
    render.findings(Finding(**finding) for finding in manifest["findings"])


def verify_prior_action(path: Path, *, as_json: bool, quiet: bool, **values: Any) -> None:
    """Verify a prior and say what was checked."""
    from drift_merge.priors.manifest import open_prior
    from drift_merge.priors.verify import verify_prior

    prior = open_prior(path)
    _verify(verify_prior, prior, prior.manifest, values, as_json=as_json, quiet=quiet)


def verify_merge_action(path: Path, *, as_json: bool, quiet: bool, **values: Any) -> None:
    """Verify a merge and say what was checked."""
    from drift_merge.merges.manifest import open_merge
    from drift_merge.merges.verify import verify_merge

    merge = open_merge(path)
    _verify(verify_merge, merge, merge.manifest, values, as_json=as_json, quiet=quiet)


def _verify(
    check: Any,
    artifact: Any,
    manifest: Mapping[str, Any],
    values: dict[str, Any],
    *,
    as_json: bool,
    quiet: bool,
) -> None:
    seed = values["seed"] if values["seed"] is not None else secrets.randbelow(2**31)
    with progress("Verifying", manifest["size_bytes"], quiet=quiet or as_json) as advance:
        report = check(artifact, **values | {"seed": seed}, progress=advance)
    if as_json:
        value = {"schema": 1, "ok": True, "tensors": report.num_tensors}
        print_json(value | {"bytes": report.size_bytes, "recomputed": list(report.recomputed)})
        return
    print(
        f"OK: {report.num_tensors:,} tensors, {render.size(report.size_bytes)}: "
        "files, headers, fingerprints and finiteness."
    )
    if report.recomputed:
        print(f"Computed again from the sources, equal: {len(report.recomputed)} (seed {seed}).")


def without_tensors(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """A manifest without its table of tensors."""
    return {key: value for key, value in manifest.items() if key != "tensors"}


def _one_reasoner(reasoners: tuple[str, ...]) -> None:
    if len(reasoners) != 1:
        raise RecipeError(
            f"expected one REASONER and one MLLM; got {len(reasoners) + 1} sources.",
            remedy="Compute one prior per reasoner; they can be combined in training.",
        )
