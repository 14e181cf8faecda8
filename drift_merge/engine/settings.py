"""What a merge method reads of a step beside its inputs: weights, options, matrices, gates."""

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from drift_merge.errors import CheckpointError
from drift_merge.maths.chunks import MethodSettings
from drift_merge.plans.plan import Plan, Step, gates_file, matrices_of
from drift_merge.recipes.recipe import method_options, method_variant
from drift_merge.storage import fingerprints


def settings_of(plan: Plan, step: Step) -> MethodSettings:
    """What a merge method reads of a step."""
    recipe = plan.recipe
    options = method_options(recipe)
    return MethodSettings(
        weights=step.weights,
        mllm_weight=step.mllm_weight,
        variant=method_variant(recipe),
        numbers={k: float(v) for k, v in options.items() if not isinstance(v, bool | str)},
        flags={k: v for k, v in options.items() if isinstance(v, bool)},
        words={k: v for k, v in options.items() if isinstance(v, str)},
        key=fingerprints.key_of(
            int(options.get("seed", 0)), step.method, step.masked_as or step.canonical
        ),
        shape=step.shape,
        is_weighted=bool(recipe.weights) or recipe.mllm_weight is not None,
        matrices=matrices_of(plan, step),
        gates=_gates(plan, step),
    )


def _gates(plan: Plan, step: Step) -> Tensor | None:
    """The factors of the directions of a step's matrix, float32; None where there are none.

    Raises:
        CheckpointError: one is NaN or Inf, or the file was changed.
    """
    file = gates_file(plan.recipe)
    if file is None or not matrices_of(plan, step):
        return None
    try:
        found = load(file.read_bytes())[step.canonical].float()  # small; a map may shrink
    except (OSError, KeyError, SafetensorError) as error:
        raise CheckpointError(
            f"{file} was changed while it was being used ({error}).",
            remedy="Let what writes it finish, then run the command again.",
        ) from error
    if not torch.isfinite(found).all():
        raise CheckpointError(
            f"{file}: the gates of {step.canonical} hold NaN or Inf.",
            remedy="Store finite factors.",
        )
    return found
