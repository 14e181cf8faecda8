"""Everything beside the weights of a merged checkpoint: taken from the mllm, byte for byte.

Config, generation config, tokenizer, chat template, image and video processors, remote code,
license. Only `config.json` is ever changed, and only its dtype, when another one is written.
"""

import re
from collections.abc import Iterator

from drift_merge.errors import CheckpointError
from drift_merge.merges.manifest import MANIFEST
from drift_merge.recipes.recipe import Recipe
from drift_merge.recipes.words import SOURCE_DTYPE
from drift_merge.storage import fingerprints
from drift_merge.storage.checkpoint import Checkpoint
from drift_merge.storage.output import OutputDirectory

# A key and its text value; the quote before the key keeps out text that only quotes such a pair.
_DTYPE = re.compile(rb'("(?:torch_dtype|dtype)"\s*:\s*)"[^"\\]*"')

CARD = "README.md"  # ours describes the merge; the mllm's describes another model


def copy_sidecars(mllm: Checkpoint, recipe: Recipe, output: OutputDirectory) -> dict[str, str]:
    """Write the sidecars into the payload.

    Returns:
        Fingerprint of every file, by its path relative to the checkpoint.

    Raises:
        CheckpointError: a sidecar of the mllm cannot be read.
    """
    written = {}
    for name, data in _sidecars(mllm):
        if name == "config.json" and recipe.dtype != SOURCE_DTYPE:
            data = _with_dtype(data, recipe.dtype)
        output.write_file(name, data)
        written[name] = fingerprints.of_bytes(data)
    return written


def _sidecars(mllm: Checkpoint) -> Iterator[tuple[str, bytes]]:
    assert mllm.path is not None
    for name in mllm.sidecars:
        if name in (MANIFEST, CARD):
            continue
        try:
            yield name, (mllm.path / name).read_bytes()
        except OSError as error:
            raise CheckpointError(
                f"{mllm.source.given}: {name} cannot be read ({error.strerror}).",
                remedy="Check that the file exists and is readable, or download it again.",
            ) from error


def _with_dtype(data: bytes, dtype: str) -> bytes:
    """`config.json` with every dtype entry set, so that loaders do not cast back.

    Replaced in the text: nothing else in the file changes, its form included.
    """
    return _DTYPE.sub(rb'\1"' + dtype.encode() + b'"', data)
