"""`drift-prior demo`: the whole path on a small pair of checkpoints made on the spot.

The names, the config and the layout on disk are those of Qwen2.5-VL and of a Qwen2 text LLM;
the sizes are tiny and the weights random around a shared ancestor. No network.
"""

import ctypes
import json
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from drift_merge.cli import options
from drift_merge.cli.commands import align, compute, inspect, methods, verify
from drift_merge.cli.running import CommandOptions
from drift_merge.errors import OutputError
from drift_merge.recipes.recipe import Recipe
from drift_merge.recipes.words import MERGE_MODULES, PRIOR, PRIOR_DTYPE, SOURCE_DTYPE
from drift_merge.storage.headers import encode_header

HIDDEN, INTERMEDIATE, HEADS, KV_HEADS, LAYERS, VOCABULARY = 128, 352, 8, 2, 4, 1000
KV = HIDDEN // HEADS * KV_HEADS
VISION_LAYERS, VISION = 2, 64

TEXT_CONFIG: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": HIDDEN,
    "intermediate_size": INTERMEDIATE,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "vocab_size": VOCABULARY,
    "rope_theta": 1000000.0,
    "rms_norm_eps": 1e-06,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
MLLM_CONFIG: dict[str, Any] = TEXT_CONFIG | {
    "architectures": ["Qwen2_5_VLForConditionalGeneration"],
    "model_type": "qwen2_5_vl",
    "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
    "vision_config": {
        "depth": VISION_LAYERS,
        "hidden_size": VISION,
        "out_hidden_size": HIDDEN,
        "num_heads": 4,
        "intermediate_size": 2 * VISION,
    },
}

Shapes = dict[str, tuple[int, ...]]


def text_shapes() -> Shapes:
    """The tensors of the text tower, named as both checkpoints store them."""
    shapes: Shapes = {
        "model.embed_tokens.weight": (VOCABULARY, HIDDEN),
        "model.norm.weight": (HIDDEN,),
        "lm_head.weight": (VOCABULARY, HIDDEN),
    }
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        shapes[prefix + "input_layernorm.weight"] = (HIDDEN,)
        shapes[prefix + "post_attention_layernorm.weight"] = (HIDDEN,)
        for name, rows in (("q", HIDDEN), ("k", KV), ("v", KV)):
            shapes[f"{prefix}self_attn.{name}_proj.weight"] = (rows, HIDDEN)
            shapes[f"{prefix}self_attn.{name}_proj.bias"] = (rows,)
        shapes[prefix + "self_attn.o_proj.weight"] = (HIDDEN, HIDDEN)
        shapes[prefix + "mlp.gate_proj.weight"] = (INTERMEDIATE, HIDDEN)
        shapes[prefix + "mlp.up_proj.weight"] = (INTERMEDIATE, HIDDEN)
        shapes[prefix + "mlp.down_proj.weight"] = (HIDDEN, INTERMEDIATE)
    return shapes


def vision_shapes() -> Shapes:
    """The vision tower and the merger, as Qwen2.5-VL stores them."""
    shapes: Shapes = {"visual.patch_embed.proj.weight": (VISION, 3, 2, 14, 14)}
    for layer in range(VISION_LAYERS):
        prefix = f"visual.blocks.{layer}."
        shapes[prefix + "norm1.weight"] = (VISION,)
        shapes[prefix + "norm2.weight"] = (VISION,)
        shapes[prefix + "attn.qkv.weight"] = (3 * VISION, VISION)
        shapes[prefix + "attn.qkv.bias"] = (3 * VISION,)
        shapes[prefix + "attn.proj.weight"] = (VISION, VISION)
        shapes[prefix + "attn.proj.bias"] = (VISION,)
        for name in ("gate", "up"):
            shapes[f"{prefix}mlp.{name}_proj.weight"] = (2 * VISION, VISION)
            shapes[f"{prefix}mlp.{name}_proj.bias"] = (2 * VISION,)
        shapes[prefix + "mlp.down_proj.weight"] = (VISION, 2 * VISION)
        shapes[prefix + "mlp.down_proj.bias"] = (VISION,)
    shapes["visual.merger.ln_q.weight"] = (VISION,)
    shapes["visual.merger.mlp.0.weight"] = (4 * VISION, 4 * VISION)
    shapes["visual.merger.mlp.0.bias"] = (4 * VISION,)
    shapes["visual.merger.mlp.2.weight"] = (HIDDEN, 4 * VISION)
    shapes["visual.merger.mlp.2.bias"] = (HIDDEN,)
    return shapes


def make_pair(directory: Path) -> tuple[Path, Path]:
    """Write `directory`/reasoner, /mllm, and /base, their ancestor; the same bytes every time.

    Returns:
        The reasoner and the mllm.
    """
    import torch

    def values(shapes: Shapes, seed: int, scale: float) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return {n: scale * torch.randn(s, generator=generator) for n, s in shapes.items()}

    def write(name: str, tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> Path:
        path = directory / name
        path.mkdir(parents=True)
        stored = {key: tensor.bfloat16() for key, tensor in tensors.items()}
        entries = [(key, "BF16", tuple(tensor.shape)) for key, tensor in stored.items()]
        with open(path / "model.safetensors", "wb") as file:
            file.write(encode_header(entries, {"format": "pt"})[0])
            for tensor in stored.values():
                file.write(ctypes.string_at(tensor.data_ptr(), 2 * tensor.numel()))
        (path / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        return path

    ancestor = values(text_shapes(), seed=0, scale=0.02)
    reasoner = values(text_shapes(), seed=1, scale=0.004)
    tuned = values(text_shapes(), seed=2, scale=0.004)
    mllm = {name: tensor + tuned[name] for name, tensor in ancestor.items()}
    mllm |= values(vision_shapes(), seed=3, scale=0.02)
    write("base", ancestor, TEXT_CONFIG)
    return (
        write("reasoner", {n: t + reasoner[n] for n, t in ancestor.items()}, TEXT_CONFIG),
        write("mllm", mllm, MLLM_CONFIG),
    )


def demo_action(output: Path | None, *, quiet: bool) -> None:
    """Make a pair and run align, compute, inspect, linear and verify on it."""

    directory = _directory(output)
    say: Callable[[str], None] = (lambda _: None) if quiet else print
    say("drift-prior demo: a text reasoner and a Qwen2.5-VL-like MLLM, tiny, random, made here.\n")
    paths = make_pair(directory)
    reasoner, mllm = map(str, paths)
    prior, merged = directory / "prior", directory / "merged"
    run = CommandOptions(threads=1, quiet=quiet)

    say(
        "1. Align names and shapes; no tensor data is read.\n"
        f"   $ drift-prior align {reasoner} {mllm}"
    )
    recipe = Recipe(method=PRIOR, reasoners=(reasoner,), mllm=mllm, dtype=PRIOR_DTYPE)
    if not quiet:
        align.align_action(recipe, as_json=False)
    say(
        "\n2. Stream the prior, delta = theta_reasoner - theta_mllm, to safetensors.\n"
        f"   $ drift-prior compute {reasoner} {mllm} -o {prior}"
    )
    compute.compute_action(recipe, prior, run)
    say(f"\n3. Inspect it.\n   $ drift-prior inspect {prior}")
    if not quiet:
        inspect.inspect_prior_action(prior, as_json=False)
    say(
        "\n4. The published baseline: 0.9 mllm + 0.1 reasoner, a complete MLLM checkpoint.\n"
        f"   $ drift-merge linear {reasoner} {mllm} -o {merged}"
    )
    merge = replace(recipe, method="linear", modules=MERGE_MODULES, dtype=SOURCE_DTYPE)
    methods.merge_action(merge, merged, run)
    say("\n5. Re-read both, and compute a sample again from the sources.")
    check: dict[str, Any] = {"map_file": None, "sample": 8, "seed": 0, "threads": 1}
    check |= {"mllm": mllm, "as_json": False, "quiet": True}
    verify.verify_prior_action(prior, reasoner=reasoner, base=None, **check)
    verify.verify_merge_action(merged, reasoners=(reasoner,), **check)
    say(
        f"\nEverything is in {directory}; base is the ancestor of both, for methods with --base."
        f" {_next_steps()}"
    )


def _directory(output: Path | None) -> Path:
    if output is None:
        return Path(tempfile.mkdtemp(prefix="drift-demo-"))
    if output.exists():
        raise OutputError(
            f"{output} exists already.", remedy="Choose another directory with -o, or none at all."
        )
    return output


def _next_steps() -> str:
    return """On real models, try next:

  R=deepseek-ai/DeepSeek-R1-Distill-Qwen-7B  M=Qwen/Qwen2.5-VL-7B-Instruct
  drift-prior align   $R $M
  drift-prior compute $R $M -o prior
  drift-merge linear  $R $M -o merged"""


@click.command()
@click.option("-o", "--output", type=options.PATH, help="Keep the results here; must not exist.")
@options.quiet_option
def demo(output: Path | None, quiet: bool) -> None:
    """Run the whole path on a small pair of checkpoints made on the spot; no network.

    Guide: drift-prior guide priors

    \b
    Example:
        drift-prior demo
    """

    demo_action(output, quiet=quiet)
