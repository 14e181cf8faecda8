"""Compute a prior: prepare, plan, stream, describe, publish."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from drift_merge.engine.job import Outcome, RunOptions, execute
from drift_merge.plans.plan import Plan
from drift_merge.plans.prepare import Prepared
from drift_merge.priors.card import prior_card
from drift_merge.priors.manifest import MANIFEST, Prior, build_manifest, open_prior
from drift_merge.storage.manifests import to_json
from drift_merge.storage.measured import Results
from drift_merge.storage.output import OutputDirectory


@dataclass(frozen=True, slots=True)
class ComputedPrior:
    """A prior that has just been published."""

    prior: Prior
    outcome: Outcome


def compute_prior(prepared: Prepared, plan: Plan, out: Path, options: RunOptions) -> ComputedPrior:
    """Stream delta = reasoner - mllm (or reasoner - base) to `out`.

    Args:
        prepared: the opened and aligned sources.
        plan: `prepared.plan()`.
        out: directory to create.
        options: threads, device, overwrite, progress.

    Raises:
        OutputError: `out` exists, clashes with an input, or cannot be written.
        CheckpointError: an input is damaged or holds NaN or Inf.
        AlignmentError: two tensors that a map pairs are not the same matrix.
    """

    def finish(output: OutputDirectory, results: Results) -> None:
        manifest: dict[str, Any] = build_manifest(prepared, plan, results)
        output.write_file("README.md", prior_card(manifest))
        output.write_file(MANIFEST, to_json(manifest))

    from drift_merge.engine.strangers import refuse_strangers  # here: it needs torch

    with options.ranks.failing_together():
        if options.ranks.is_first:
            refuse_strangers(plan, prepared.findings)
    outcome = execute(plan, out, options, finish)
    return ComputedPrior(open_prior(out), outcome)
