"""Every merge method on tiny checkpoints of five MLLM families, as transformers writes and loads.

    python -m pytest -m slow tests/real_models/test_merge_suite.py -rP     # needs transformers

A text LLM is merged into the language tower of an MLLM of its family, with their common ancestor
where the method needs one. Every output must load without a missing, unexpected or mismatched
key and generate, about text and about an image; what was merged and copied is counted.
"""

import importlib.util
import io
import json
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from commands import run
from stored import assert_same_sidecars, read

from tests import tiny_models

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.filterwarnings("default"),  # transformers' own
    pytest.mark.skipif(
        importlib.util.find_spec("transformers") is None, reason="needs transformers"
    ),
]

LAYERS = 3
TEXT = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
QWEN_VISION = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 2,
    "patch_size": 14,
    "out_hidden_size": TEXT["hidden_size"],
}
QWEN_TOKENS = {
    "image_token_id": tiny_models.IMAGE,
    "vision_start_token_id": tiny_models.VISION_START,
    "vision_end_token_id": tiny_models.VISION_END,
    "video_token_id": 93,
}
ONLY_HERE = {"layer-swap": ["--keep-layers", "0:1"]}  # its default keeps six layers


class Family(NamedTuple):
    """How to make one pair."""

    text: Callable[[], Any]  # a causal language model
    mllm: Callable[[], Any]
    tower: str  # attribute of the mllm's model
    image: Callable[[], dict[str, Any]]  # inputs that show an image


def qwen2_5_vl() -> Any:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    text = TEXT | {"rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}}
    vision = QWEN_VISION | {"fullatt_block_indexes": [1], "window_size": 56}
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, **QWEN_TOKENS)
    return Qwen2_5_VLForConditionalGeneration(config)


def qwen3() -> Any:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    return Qwen3ForCausalLM(Qwen3Config(**TEXT))


def qwen3_vl() -> Any:
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "mrope_interleaved": True}
    vision = QWEN_VISION | {"deepstack_visual_indexes": [0], "num_position_embeddings": 16}
    config = Qwen3VLConfig(
        text_config=TEXT | {"rope_scaling": rope}, vision_config=vision, **QWEN_TOKENS
    )
    return Qwen3VLForConditionalGeneration(config)


GEMMA = TEXT | {"tie_word_embeddings": True, "sliding_window": 16, "sliding_window_pattern": 2}


def gemma3_text() -> Any:
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    return Gemma3ForCausalLM(Gemma3TextConfig(**GEMMA))


def gemma3() -> Any:
    from transformers import (
        Gemma3Config,
        Gemma3ForConditionalGeneration,
        Gemma3TextConfig,
        SiglipVisionConfig,
    )

    config = Gemma3Config(
        text_config=Gemma3TextConfig(**GEMMA),
        vision_config=SiglipVisionConfig(**VISION | {"patch_size": 7}),
        mm_tokens_per_image=4,
        image_token_index=tiny_models.IMAGE,
        boi_token_index=tiny_models.VISION_START,
        eoi_token_index=tiny_models.VISION_END,
    )
    return Gemma3ForConditionalGeneration(config)


def pixels(*shape: int) -> Any:
    import torch

    return torch.rand(shape, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)


def prompt(*, with_image: bool) -> dict[str, Any]:
    """Token ids: text, and perhaps the four tokens of an image in it."""
    import torch

    image = (
        [tiny_models.VISION_START, *[tiny_models.IMAGE] * 4, tiny_models.VISION_END]
        if with_image
        else []
    )
    ids = torch.tensor([[1, 5, 6, *image, 7, 8, 9]])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def square() -> dict[str, Any]:
    """One image of 28 x 28 pixels."""
    return prompt(with_image=True) | {"pixel_values": pixels(1, 3, 28, 28)}


def tiles() -> dict[str, Any]:
    """The same as Idefics3 takes it."""
    return prompt(with_image=True) | {"pixel_values": pixels(1, 1, 3, 28, 28)}


def patches() -> dict[str, Any]:
    """The same size as flattened patches: two frames of 4 x 4 patches of 14 x 14 pixels."""
    import torch

    inputs = prompt(with_image=True)
    inputs["pixel_values"] = pixels(16, 3 * 2 * 14 * 14)
    inputs["image_grid_thw"] = torch.tensor([[1, 4, 4]])
    inputs["mm_token_type_ids"] = (inputs["input_ids"] == tiny_models.IMAGE).int()
    return inputs


def gemma_square() -> dict[str, Any]:
    """Gemma 3 is told which tokens are of the image."""
    inputs = square()
    return inputs | {"token_type_ids": (inputs["input_ids"] == tiny_models.IMAGE).int()}


LLAMA = partial(tiny_models.llama, TEXT)
FAMILIES = {
    "Qwen2 into Qwen2.5-VL": Family(
        partial(tiny_models.qwen2, TEXT), qwen2_5_vl, "language_model", patches
    ),
    "Llama into LLaVA": Family(
        LLAMA, partial(tiny_models.llava, TEXT, VISION), "language_model", square
    ),
    "Llama into Idefics3": Family(
        LLAMA, partial(tiny_models.idefics3, TEXT, VISION), "text_model", tiles
    ),
    "Qwen3 into Qwen3-VL": Family(qwen3, qwen3_vl, "language_model", patches),
    "Gemma 3 text into Gemma 3": Family(gemma3_text, gemma3, "language_model", gemma_square),
}


def make_pair(family: Family, directory: Path) -> None:
    """Write base, reasoner and mllm: random, two descendants of one ancestor, in bfloat16."""
    import torch

    torch.manual_seed(0)
    base = family.text()
    reasoner, mllm = family.text(), family.mllm()
    reasoner.load_state_dict(base.state_dict())
    tower = getattr(mllm.model, family.tower)
    tower.load_state_dict(base.model.state_dict())
    if not base.config.tie_word_embeddings:
        mllm.lm_head.load_state_dict(base.lm_head.state_dict())
    with torch.no_grad():
        for module in (reasoner.model, tower):
            for parameter in module.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
    for name, model in (("base", base), ("reasoner", reasoner), ("mllm", mllm)):
        model.to(torch.bfloat16).save_pretrained(directory / name)


def drift_merge(*arguments: str) -> None:
    """`drift-merge` in this process: every start of another one would import torch."""
    from drift_merge.cli import entry
    from drift_merge.cli.merge import group

    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["drift-merge", *arguments])
        with redirect_stdout(out), redirect_stderr(err), pytest.raises(SystemExit) as ended:
            entry.run(group, "drift-merge")
    assert not ended.value.code, err.getvalue()


def load_and_generate(path: Path, family: Family) -> tuple[int, int]:
    """Load strictly; return the number of misfit keys and of new tokens, text and image."""
    import torch
    from transformers import AutoModelForImageTextToText

    model, told = AutoModelForImageTextToText.from_pretrained(
        path, dtype=torch.bfloat16, output_loading_info=True
    )
    num_new = 0
    for inputs in (prompt(with_image=False), family.image()):
        length = inputs["input_ids"].shape[1]
        found = model.generate(**inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False)
        assert found.shape == (1, length + 4)
        num_new += found.shape[1] - length
    return sum(map(len, told.values())), num_new


def changed(merged: Path, mllm: Path) -> set[str]:
    """Names of the tensors whose bytes differ."""
    before, after = read(mllm), read(merged)
    assert before.keys() == after.keys()
    assert all(before[name][:2] == after[name][:2] for name in before)
    return {name for name in before if not np.array_equal(before[name][2], after[name][2])}


@pytest.mark.parametrize("name", FAMILIES)
def test_every_method_merges_the_tower_and_the_result_loads_and_generates(
    name: str, tmp_path: Path
) -> None:
    from transformers.utils.logging import disable_progress_bar

    from drift_merge.maths.methods import METHODS

    disable_progress_bar()
    family = FAMILIES[name]
    make_pair(family, tmp_path)
    reasoner, mllm, base = (str(tmp_path / part) for part in ("reasoner", "mllm", "base"))
    # Everything that the text model has but its embedding and its head.
    text = {
        n for n in read(tmp_path / "reasoner") if "embed_tokens" not in n and "lm_head" not in n
    }
    print(f"\n{name}: {len(read(tmp_path / 'mllm'))} tensors, {len(text)} of them to be merged")
    print("method            merged  copied  misfit keys  new tokens")
    for method in METHODS.values():
        out = tmp_path / "out" / method.name
        given = ["--base", base] if method.base == "required" else []
        given += ONLY_HERE.get(method.name, [])
        drift_merge(method.name, reasoner, mllm, *given, "-o", str(out), "-q")
        manifest = json.loads((out / "drift_merge.json").read_text())
        num_merged = manifest["counts"].pop(method.name, 0)
        num_copied = sum(manifest["counts"].values())
        misfits, num_new = load_and_generate(out, family)
        print(f"{method.name:17}{num_merged:7}{num_copied:8}{misfits:13}{num_new:12}")
        expected = len(text)
        if method.name == "layer-swap":
            expected -= sum(".layers.0." in n for n in text)
        assert num_merged == expected
        assert num_merged + num_copied == len(read(tmp_path / "mllm"))
        assert misfits == 0
        moved = changed(out, tmp_path / "mllm")
        merged = {n for n, e in manifest["tensors"].items() if e["method"] == method.name}
        assert moved <= merged
        # Small steps may round away (nearswap) and masks may miss a small tensor, not most.
        assert len(moved) > 0.5 * len(merged), method.name
        assert_same_sidecars(out, tmp_path / "mllm")
    first = tmp_path / "out" / "linear"
    run("drift-merge", "verify", first, "--reasoner", reasoner, "--mllm", mllm, "--sample", 99)
