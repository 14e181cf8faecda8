"""What a kit is asked for, and what comes back."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from drift_merge.errors import EvaluationError, RecipeError

# The usual bounds of Qwen's models, 256 and 1280 patches of 28 x 28; kits have other defaults.
MIN_PIXELS, MAX_PIXELS = 256 * 28 * 28, 1280 * 28 * 28


@dataclass(frozen=True, slots=True, kw_only=True)
class KitOptions:
    """How a kit evaluates; the same for both ends of a comparison."""

    tasks: tuple[str, ...]
    python: str  # interpreter that has the kit
    limit: int | None = None
    max_tokens: int | None = None
    min_pixels: int = MIN_PIXELS
    max_pixels: int = MAX_PIXELS
    kit_model: str | None = None  # the kit's own name of the model's class
    kit_path: Path | None = None  # a clone, or a folder of tasks
    kit_args: tuple[str, ...] = ()  # words for the kit
    model_args: Mapping[str, str] = field(default_factory=dict)  # of the kit's model
    device: str | None = None

    def as_data(self) -> dict[str, Any]:
        """For manifests and to tell evaluations apart."""
        found = {name: getattr(self, name) for name in self.__slots__}
        found["tasks"], found["kit_args"] = list(self.tasks), list(self.kit_args)
        found["kit_path"] = None if self.kit_path is None else str(self.kit_path)
        return found | {"model_args": dict(self.model_args)}


@dataclass(frozen=True, slots=True)
class TaskScore:
    """What a kit has found on one task."""

    metric: str  # its name in the kit
    value: float  # in the kit's unit
    items: Mapping[str, float]  # item -> score; empty where the kit left none


def class_of(
    config: Mapping[str, Any], table: Mapping[str, str], kit: str, given: str | None
) -> str:
    """The kit's name for the class of a model.

    Args:
        config: of the model.
        table: model_type -> name.
        kit: for messages.
        given: by the user, in its place.

    Raises:
        RecipeError: the table does not have the architecture.
    """
    if given is not None:
        return given
    kind = str(config.get("model_type", ""))
    if kind in table:
        return table[kind]
    shown = ", ".join(config.get("architectures") or [kind or "no architecture"])
    raise RecipeError(
        f"{kit}'s name for {shown} is not known here.",
        remedy=f"Give the name that {kit} has for it: --kit-model NAME. Known: "
        f"{', '.join(sorted(table))}.",
    )


def require_tasks(found: Mapping[str, Any], tasks: Sequence[str], kit: str, where: Path) -> None:
    """Refuse results that lack a task.

    Raises:
        EvaluationError: naming the first.
    """
    missing = [task for task in tasks if task not in found]
    if missing:
        raise EvaluationError(
            f"{kit} left no result of {missing[0]} in {where}.",
            remedy=f"See what it said in {where}; it has {', '.join(found) or 'no results'}.",
        )
