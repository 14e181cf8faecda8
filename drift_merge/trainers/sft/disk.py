"""Names a full disk, which every library says in its own way."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from drift_merge.errors import DriftMergeError, OutputError
from drift_merge.storage.shards import free_bytes
from drift_merge.trainers.sft.request import last_checkpoint

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FULL_WORDS = (
    *(f"(os error {number})" for number in _FULL),  # safetensors, and before 0.5:
    *(f"Os {{ code: {number}," for number in _FULL),
    *("inline_container.cc", "iostream error", "PytorchStreamWriter failed"),  # torch.save
)


@contextmanager
def full_disk_named(run: Path) -> Iterator[None]:
    """Turn the many errors of libraries that cannot write into an OutputError.

    torch.save says "unexpected pos" where its file could not grow, safetensors speaks in text.

    Raises:
        OutputError: the disk is full, or a limit on space or size of files was reached.
    """
    try:
        yield
    except Exception as error:
        if not _is_full_disk(error):
            raise
        is_kept = last_checkpoint(run) is not None
        then = "add --resume, which goes on from the last whole checkpoint" if is_kept else "begin"
        raise OutputError(
            f"the run beside {run.parent / run.stem} cannot be written, with"
            f" {free_bytes(run.parent):,} bytes free on its disk: {error}",
            remedy=f"Free some space, then repeat the command: {then}."
            " Checkpoints hold weights and optimizer, up to three at a time; fewer with a larger"
            " --save-steps.",
        ) from error


def _is_full_disk(error: BaseException | None) -> bool:
    if error is None or isinstance(error, DriftMergeError):
        return False
    number = error.errno if isinstance(error, OSError) else None
    is_full = number in _FULL or any(words in str(error) for words in _FULL_WORDS)
    return is_full or _is_full_disk(error.__cause__) or _is_full_disk(error.__context__)
