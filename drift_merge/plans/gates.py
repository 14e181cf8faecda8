"""Learned factors of singular directions: which file has them, and for which tensors.

A gates file is one .safetensors: for each projection, under its canonical name, a vector with the
factor of the first direction, the second, ...; what is beyond its end gets nothing. FRISM and
AdaRank learn such factors for the singular directions of reasoner - base.
"""

from pathlib import Path

from drift_merge.errors import CheckpointError, RecipeError, SourceError
from drift_merge.names.tensors import matrix_shape
from drift_merge.plans.plan import Plan, Step, gates_file, matrices_of
from drift_merge.storage.headers import TensorInfo, read_header


def gates_of(file: Path) -> dict[str, TensorInfo]:
    """The vectors of a gates file, by canonical name.

    Raises:
        SourceError: there is no such file.
        CheckpointError: it is no .safetensors, or holds something else than vectors of floats.
    """
    if not file.is_file():
        raise SourceError(
            f"--gates {file}: there is no such file.", remedy="Name a .safetensors file."
        )
    found = read_header(file, file.name).tensors
    for info in found.values():
        if len(info.shape) != 1 or info.dtype not in ("F16", "BF16", "F32", "F64"):
            raise CheckpointError(
                f"{file}: {info.name} is {info.dtype} {info.shape}; expected a vector of floats.",
                remedy="Store one vector per projection, such as sigmoid(g) of FRISM.",
            )
    return found


def require_gates(plan: Plan) -> None:
    """Refuse a gates file that does not fit the merge, tensor by tensor.

    Raises:
        RecipeError: a projection has no gates, gates have no projection, or there are too many.
    """
    file = gates_file(plan.recipe)
    if file is None:
        return
    found = gates_of(file)
    steps = {s.canonical: s for s in plan.parameters if matrices_of(plan, s)}
    lacking, unknown = sorted(steps.keys() - found.keys()), sorted(found.keys() - steps.keys())
    if lacking or unknown:
        what = f"{lacking[0]} has no gates" if lacking else f"{unknown[0]} is not merged"
        raise RecipeError(
            f"--gates {file}: {what} ({len(lacking):,} projections without gates, "
            f"{len(unknown):,} gates without a projection).",
            remedy="Select what the file has gates for, with --modules and --layers.",
        )
    for name, step in steps.items():
        _require_fit(plan, step, found[name], file)


def _require_fit(plan: Plan, step: Step, info: TensorInfo, file: Path) -> None:
    count = len(matrices_of(plan, step))
    if count > 1:
        raise RecipeError(
            f"--gates {file}: {step.name} holds {count:,} projections; gates are one vector each.",
            remedy="Leave that tensor out with --modules re:REGEX.",
        )
    if not 1 <= info.shape[0] <= min(matrix_shape(step.shape)):
        raise RecipeError(
            f"--gates {file}: {info.name} has {info.shape[0]:,} gates; its matrix has "
            f"{min(matrix_shape(step.shape)):,} directions.",
            remedy="Give at most as many as there are directions, at least one.",
        )
