"""The files of a checkpoint that name its tokens: found beside the weights, or fetched and read."""

from pathlib import Path

from drift_merge.names.tokens.files import TOKEN_FILES, Vocabularies, vocabulary_file
from drift_merge.names.tokens.formats import VOCABULARIES
from drift_merge.names.vocabulary import Vocabulary
from drift_merge.storage.checkpoint import Checkpoint
from drift_merge.storage.folder.faults import refuse_pointer


def read_vocabularies(
    reasoner: Checkpoint, mllm: Checkpoint, known: Vocabularies | None = None
) -> tuple[Vocabulary, Vocabulary]:
    """Read token -> id of both sides.

    Args:
        reasoner: one side.
        mllm: the other.
        known: what was read before; vocabularies of equal bytes are one object.

    Raises:
        AlignmentError, CheckpointError: see `Vocabularies.read`.
        SourceError: a file on the Hub could not be fetched.
    """
    known = known or Vocabularies()
    one, other = (known.read(_files(side), side.source.label) for side in (reasoner, mllm))
    return one, other


def _files(checkpoint: Checkpoint) -> dict[str, Path]:
    """Where the files lie that name tokens; of those that hold a vocabulary the first alone."""
    present = [name for name in TOKEN_FILES if name in checkpoint.sidecars]
    main = vocabulary_file(present)
    wanted = [name for name in present if name == main or name not in VOCABULARIES]
    return {name: _path(checkpoint, name) for name in wanted}


def _path(checkpoint: Checkpoint, name: str) -> Path:
    if checkpoint.path is not None and (checkpoint.path / name).is_file():
        path = checkpoint.path / name
        refuse_pointer(f"{checkpoint.source.given}: {name}", path)
        return path
    from drift_merge.storage.hub import models

    return models.fetch_file(checkpoint.source, name)
