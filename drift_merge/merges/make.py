"""Make a merged checkpoint: stream the weights, copy the sidecars, describe, publish."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from drift_merge.engine.job import Finish, Job, Outcome, RunOptions, execute_all
from drift_merge.errors import AlignmentError
from drift_merge.merges.card import merge_card
from drift_merge.merges.manifest import MANIFEST, Merge, build_manifest, open_merge
from drift_merge.merges.sidecars import CARD, copy_sidecars
from drift_merge.plans.plan import Plan
from drift_merge.plans.prepare import Prepared
from drift_merge.storage.manifests import to_json
from drift_merge.storage.measured import Results
from drift_merge.storage.output import OutputDirectory


@dataclass(frozen=True, slots=True)
class MadeMerge:
    """A merge that has just been published."""

    merge: Merge
    outcome: Outcome


def make_merge(prepared: Prepared, plan: Plan, out: Path, options: RunOptions) -> MadeMerge:
    """Write the merged checkpoint of a plan to `out`.

    Raises:
        OutputError: `out` exists, clashes with an input, or cannot be written.
        CheckpointError: an input is damaged or holds NaN or Inf.
        AlignmentError: two tensors that a map pairs are not the same matrix.
    """
    return make_merges([(prepared, plan, out)], options)[0]


def make_merges(
    jobs: Sequence[tuple[Prepared, Plan, Path]], options: RunOptions
) -> list[MadeMerge]:
    """Write several merges of the same sources in one pass over them; see `make_merge`."""
    from drift_merge.engine.strangers import refuse_strangers  # here: it needs torch

    with options.ranks.failing_together():
        for prepared, plan, _ in jobs if options.ranks.is_first else ():
            refuse_strangers(plan, prepared.findings)
    outcomes = execute_all(
        [Job(plan, out, finish_merge(prepared, plan)) for prepared, plan, out in jobs], options
    )
    return [
        MadeMerge(open_merge(out), outcome)
        for (_, _, out), outcome in zip(jobs, outcomes, strict=True)
    ]


def finish_merge(prepared: Prepared, plan: Plan) -> Finish:
    """What writes everything beside the weights of a merge."""

    def finish(output: OutputDirectory, results: Results) -> None:
        _require_one_parameter(prepared, plan, results)
        sidecars = copy_sidecars(prepared.mllm, prepared.recipe, output)
        manifest = build_manifest(prepared, plan, results, sidecars)
        output.write_file(CARD, merge_card(manifest))
        output.write_file(MANIFEST, to_json(manifest))

    return finish


def _require_one_parameter(prepared: Prepared, plan: Plan, results: Results) -> None:
    """Refuse names that only the config calls one parameter, now that their data has been read."""
    for step in plan.steps:
        first = step.second_name_of
        if not first or results[step.name]["fingerprint"] == results[first]["fingerprint"]:
            continue
        raise AlignmentError(
            f"{prepared.mllm.source.label}: the config ties {step.name} to {first}, but both are "
            "stored and differ.",
            remedy="Run the command without --stream: with all data at hand they are merged as "
            "two. Or leave embed and head out, e.g. --modules attn,mlp,norm",
        )
