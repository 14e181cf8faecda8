"""What a user should know of a checkpoint's folder, as it is opened."""

from collections.abc import Collection
from dataclasses import dataclass

from drift_merge.storage.folder.contents import Folder, is_training_state


@dataclass(frozen=True, slots=True)
class CheckpointNote:
    """Something that a user should know of a checkpoint: a code and a sentence."""

    code: str
    message: str


def adapter_notes(label: str, folder: Folder) -> tuple[CheckpointNote, ...]:
    """A note where an adapter lies beside a whole model."""
    if "adapter_config.json" not in folder.carried:
        return ()
    message = f"{label} holds a whole model and an adapter: the model counts, without the adapter."
    return (CheckpointNote("adapter", message),)


def choice_notes(label: str, shards: Collection[str], folder: Folder) -> tuple[CheckpointNote, ...]:
    """A note where names alone have decided which of several files are the model.

    Args:
        label: short name of the checkpoint.
        shards: the files that were taken.
        folder: all others; an index among them has been followed.
    """
    others = [
        name
        for name in (*folder.left_out, *folder.carried)
        if name.endswith(".safetensors") and "/" not in name
    ]
    others = [
        name
        for name in others
        if not name.startswith("adapter_model") and not is_training_state(name)
    ]
    if not others or "model.safetensors" in shards:
        return ()
    listed = sorted(shards)
    taken = listed[0] if len(listed) == 1 else f"{listed[0]} and {len(listed) - 1:,} more"
    rest = ", ".join(others[:3]) + (" and others" if len(others) > 3 else "")
    message = f"{label} has no index; by their names {taken} are the model, and {rest} not."
    return (CheckpointNote("formats", message),)
