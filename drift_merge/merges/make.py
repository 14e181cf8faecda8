"""Make a merged checkpoint: stream the weights, copy the sidecars, describe, publish."""

from dataclasses import dataclass
from pathlib import Path

from drift_merge.engine.job import Outcome, RunOptions, execute
from drift_merge.engine.manifests import to_json
from drift_merge.engine.plan import Plan
from drift_merge.engine.prepare import Prepared
from drift_merge.merges.card import merge_card
from drift_merge.merges.manifest import MANIFEST, Merge, build_manifest, open_merge
from drift_merge.merges.sidecars import CARD, copy_sidecars
from drift_merge.storage.journal import Results
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
    """

    def finish(output: OutputDirectory, results: Results) -> None:
        sidecars = copy_sidecars(prepared.mllm, prepared.recipe, output)
        manifest = build_manifest(prepared, plan, results, sidecars)
        output.write_file(CARD, merge_card(manifest))
        output.write_file(MANIFEST, to_json(manifest))

    outcome = execute(plan, out, options, finish)
    return MadeMerge(open_merge(out), outcome)
