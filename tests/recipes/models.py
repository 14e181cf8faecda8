"""A directory of tiny models for recipes: `mllm`, `reasoner`, `other` and `base`."""

from pathlib import Path

from tests import checkpoints as c

LAYERS = 4
_WORDS = {"tokenizer.json": c.tokenizer()}


def write_models(directory: Path) -> Path:
    """Write the four models, in float32."""
    c.make_pair(
        directory, layers=LAYERS, dtype="F32", reasoner_sidecars=_WORDS, mllm_sidecars=_WORDS
    )
    for seed, name in enumerate(("base", "other"), start=7):
        tensors = c.reasoner_tensors(LAYERS, seed=seed, dtype="F32")
        c.write_checkpoint(directory / name, tensors, c.text_config(LAYERS), sidecars=_WORDS)
    return directory


def write_recipe(directory: Path, text: str) -> Path:
    """Write `recipe.yml` beside the models."""
    file = directory / "recipe.yml"
    file.write_text(text)
    return file
