"""NaN and Inf of a step: counted where something is suspicious, refused where they are computed."""

from collections.abc import Mapping

from torch import Tensor

from drift_merge.engine.reader import Raw
from drift_merge.errors import CheckpointError
from drift_merge.maths.measures import count_nonfinite
from drift_merge.plans.plan import Plan, Step

_RESULT = "the result"  # how the label of a count in an output begins


def count_all(plan: Plan, step: Step, raw: Raw, out: Tensor, counts: dict[str, int]) -> None:
    """Count NaN and Inf of a suspicious chunk, in each input and in the rounded output."""
    bad_output = count_nonfinite(out)
    for view, (tensor, _) in zip(step.inputs, raw, strict=True):
        if bad := count_nonfinite(tensor):
            label = f"{plan.sources[view.source].source.label}: {view.parts[0].name}"
            counts[label] = counts.get(label, 0) + bad
            # A cast keeps each: what there are more of has become too large for the dtype.
            bad_output = bad_output - bad if step.method == "cast" else 0
    if bad_output:
        label = f"{_RESULT} in {step.dtype}: {step.name}"
        counts[label] = counts.get(label, 0) + bad_output


def refuse_nonfinite(plan: Plan, step: Step, counts: Mapping[str, int]) -> None:
    """Raise CheckpointError for counted NaN and Inf, unless the recipe allows them."""
    if step.method == "cast":  # a copy in another dtype: only what overflowed in it is computed
        counts = {label: n for label, n in counts.items() if label.startswith(_RESULT)}
    if not counts or plan.recipe.allow_nonfinite:
        return
    found = "; ".join(f"{label}: {n:,} values" for label, n in counts.items())
    raise CheckpointError(
        f"NaN or Inf found while making {step.name}: {found}.",
        remedy="The checkpoint is damaged, or the output dtype is too narrow (--dtype float32). "
        "To keep such values on purpose: --allow-nonfinite",
    )
