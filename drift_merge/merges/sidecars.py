"""Everything beside the weights of a merged checkpoint: taken from the mllm, byte for byte.

Config, generation config, tokenizer, chat template, image and video processors, remote code,
license, adapters, weights of other models. Only `config.json` is ever changed, and only its
dtype, when another one is written.
"""

import re

from drift_merge.merges.manifest import MANIFEST
from drift_merge.recipes.recipe import Recipe
from drift_merge.recipes.words import SOURCE_DTYPE
from drift_merge.storage import fingerprints
from drift_merge.storage.checkpoint import Checkpoint
from drift_merge.storage.folder.faults import cannot_open
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
    assert mllm.path is not None
    written = {}
    for name in mllm.sidecars:
        if name in (MANIFEST, CARD):
            continue
        label = f"{mllm.source.given}: {name}"
        if name != "config.json" or recipe.dtype == SOURCE_DTYPE:
            written[name] = output.copy_file(name, mllm.path / name, label)
            continue
        try:
            data = _with_dtype((mllm.path / name).read_bytes(), recipe.dtype)
        except OSError as error:
            raise cannot_open(label, mllm.path / name, error) from error
        output.write_file(name, data)
        written[name] = fingerprints.of_bytes(data)
    return written


def _with_dtype(data: bytes, dtype: str) -> bytes:
    """`config.json` with every dtype entry set, so that loaders do not cast back.

    Replaced in the text: nothing else in the file changes, its form included.
    """
    return _DTYPE.sub(rb'\1"' + dtype.encode() + b'"', data)
