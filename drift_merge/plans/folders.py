"""What is said before a merge of things that are not computed: files beside the weights, tables."""

from collections.abc import Sequence

from drift_merge.names.tensors import Alignment
from drift_merge.plans.views import is_table
from drift_merge.storage import sizes
from drift_merge.storage.checkpoint import Checkpoint
from drift_merge.storage.folder.contents import COPY, DANGLING, TRAINING, is_foreign_weight
from drift_merge.storage.folder.notes import CheckpointNote

_EXAMPLES = 3


def folder_notes(mllm: Checkpoint) -> list[CheckpointNote]:
    """One note of what is left out of the mllm's folder, one of weights that are carried over."""
    notes = []
    left_out = mllm.folder.left_out
    if left_out:
        count = sum(found.num_files for found in left_out.values())
        size = sizes.size(sum(found.size_bytes for found in left_out.values()))
        kinds = {
            reason: [name for name, found in left_out.items() if found.reason == reason]
            for reason in (COPY, TRAINING, DANGLING)
        }
        listed = "; ".join(f"{reason}: {_few(names)}" for reason, names in kinds.items() if names)
        message = f"Left out of the mllm's folder ({_files(count)}, {size}): {listed}."
        notes.append(CheckpointNote("left_out", message))
    weights = {name: n for name, n in mllm.folder.carried.items() if is_foreign_weight(name)}
    if weights:
        size = sizes.size(sum(max(0, n) for n in weights.values()))
        message = (
            f"Weights of others are carried over as they are, made for the mllm before the merge "
            f"({_files(len(weights))}, {size}): {_few(list(weights))}."
        )
        notes.append(CheckpointNote("carried", message))
    return notes


def table_notes(
    mllm: Checkpoint, reasoners: Sequence[tuple[Checkpoint, Alignment]]
) -> list[CheckpointNote]:
    """A note of selected tensors that hold indices or masks, so that nothing is computed."""
    tables = [
        pair.mllm
        for checkpoint, alignment in reasoners
        for pair in alignment.pairs
        if is_table(pair, mllm, checkpoint)
    ]
    found = sorted(set(tables))
    if not found:
        return []
    message = (
        f"{len(found):,} selected tensors hold indices or masks, not weights, and stay as the "
        f"mllm has them: {_few(found)}."
    )
    return [CheckpointNote("integers", message)]


def _files(count: int) -> str:
    return f"{count:,} file" + ("s" if count != 1 else "")


def _few(names: list[str]) -> str:
    more = f" and {len(names) - _EXAMPLES:,} more" if len(names) > _EXAMPLES else ""
    return ", ".join(names[:_EXAMPLES]) + more
