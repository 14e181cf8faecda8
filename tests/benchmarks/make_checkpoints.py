"""Random checkpoints of real shapes for the benchmarks: a reasoner and an mllm of the same size.

    python tests/benchmarks/make_checkpoints.py --size 3 --out DIR

writes DIR/reasoner and DIR/mllm, two text checkpoints with the tensor names and
shapes of Qwen2.5-1.5B (3.09 GB in bfloat16) or a multiple of its layers, so that
tools that know only text models can be measured on the same files; with `--vision`
the second one is a Qwen2.5-VL with a small vision tower, and with `--base` DIR/base is
their ancestor. Values are normal noise around a shared ancestor, written in blocks: memory
stays small. `--layers` and `--vocab` make smaller ones, to try a script.
"""

import argparse
import json
import struct
from pathlib import Path

import numpy as np

HIDDEN, INTERMEDIATE, KV, VOCAB = 1536, 8960, 256, 151936
LAYERS = {1: 6, 3: 28, 6: 60}  # size in GB (about) -> number of layers


def tensor_shapes(num_layers: int, vocab: int = VOCAB) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, HIDDEN)}
    for i in range(num_layers):
        p = f"model.layers.{i}."
        shapes[p + "input_layernorm.weight"] = (HIDDEN,)
        shapes[p + "mlp.down_proj.weight"] = (HIDDEN, INTERMEDIATE)
        shapes[p + "mlp.gate_proj.weight"] = (INTERMEDIATE, HIDDEN)
        shapes[p + "mlp.up_proj.weight"] = (INTERMEDIATE, HIDDEN)
        shapes[p + "post_attention_layernorm.weight"] = (HIDDEN,)
        for n, rows in (("q", HIDDEN), ("k", KV), ("v", KV)):
            shapes[p + f"self_attn.{n}_proj.weight"] = (rows, HIDDEN)
            shapes[p + f"self_attn.{n}_proj.bias"] = (rows,)
        shapes[p + "self_attn.o_proj.weight"] = (HIDDEN, HIDDEN)
    shapes["model.norm.weight"] = (HIDDEN,)
    return shapes


def text_config(num_layers: int, vocab: int = VOCAB) -> dict[str, object]:
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "vocab_size": vocab,
        "rope_theta": 1000000.0,
        "rms_norm_eps": 1e-06,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "bos_token_id": 151643,
        "eos_token_id": 151643,
        "max_position_embeddings": 32768,
    }


def write_checkpoint(path: Path, shapes: dict[str, tuple[int, ...]], config: dict, seed: int):
    """One safetensors file, written in blocks (about 64 MB at a time); seed 0: without noise."""
    path.mkdir(parents=True, exist_ok=True)
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, shape in shapes.items():
        size = 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    shared = np.random.default_rng(0).standard_normal(1 << 21, dtype=np.float32)
    own = np.random.default_rng(seed).standard_normal((1 << 21) - 7919, dtype=np.float32)
    with open(path / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(raw)) + raw)
        for shape in shapes.values():
            n = int(np.prod(shape))
            for start in range(0, n, 1 << 24):
                count = min(1 << 24, n - start)
                values = 0.02 * np.resize(shared, count)
                if seed:
                    values += 0.004 * np.resize(own, count)
                file.write((values.view(np.uint32) >> 16).astype(np.uint16).tobytes())
    (path / "config.json").write_text(json.dumps(config, indent=2))
    (path / "generation_config.json").write_text("{}")


def write_sparse(path: Path, num_layers: int, num_shards: int, intermediate: int) -> None:
    """A checkpoint of holes: headers, index and sizes of a large one on little disk.

    The middle of every matrix holds some values: a look at a few bytes of it finds out there that
    no two are equal, as in a real model, and does not try the other places.
    """
    chance = np.random.default_rng(list(path.name.encode()))
    path.mkdir(parents=True)
    shapes = tensor_shapes(num_layers)
    for name, shape in shapes.items():
        shapes[name] = tuple(intermediate if size == INTERMEDIATE else size for size in shape)
    sizes = {name: 2 * int(np.prod(shape)) for name, shape in shapes.items()}
    total, done, weight_map = sum(sizes.values()), 0, {}
    headers: list[dict[str, dict]] = [{} for _ in range(num_shards)]
    ends = [0] * num_shards
    for name, shape in shapes.items():
        number = min(num_shards - 1, done * num_shards // total)
        begin, ends[number] = ends[number], ends[number] + sizes[name]
        place = [begin, ends[number]]
        headers[number][name] = {"dtype": "BF16", "shape": shape, "data_offsets": place}
        weight_map[name] = f"model-{number + 1:05d}-of-{num_shards:05d}.safetensors"
        done += sizes[name]
    for number, header in enumerate(headers, start=1):
        raw = json.dumps(header).encode()
        with open(path / f"model-{number:05d}-of-{num_shards:05d}.safetensors", "wb") as file:
            file.write(struct.pack("<Q", len(raw)) + raw)
            file.truncate(8 + len(raw) + ends[number - 1])
            for entry in header.values():
                if len(entry["shape"]) > 1:
                    begin, end = entry["data_offsets"]
                    file.seek(8 + len(raw) + begin + (end - begin) // 4 * 2)
                    file.write(chance.bytes(64))
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    (path / "config.json").write_text(json.dumps(text_config(num_layers)))


def write_tokenizer(path: Path, vocab: int) -> None:
    """A `tokenizer.json` of whole words, so that rows of embeddings can be matched."""
    words = {f"word{i}": i for i in range(vocab)}
    model = {"type": "WordLevel", "vocab": words, "unk_token": "word0"}
    empty = ("truncation", "padding", "normalizer", "post_processor", "decoder")
    value = {"version": "1.0", **dict.fromkeys(empty), "added_tokens": [], "model": model}
    value["pre_tokenizer"] = {"type": "Whitespace"}
    (path / "tokenizer.json").write_text(json.dumps(value))


def make(
    out: Path,
    size: int,
    *,
    vision: bool = False,
    base: bool = False,
    layers: int | None = None,
    vocab: int = VOCAB,
) -> list[Path]:
    """Write the checkpoints; with a base, all with a tokenizer."""
    layers = layers or LAYERS[size]
    shapes, config = tensor_shapes(layers, vocab), text_config(layers, vocab)
    write_checkpoint(out / "reasoner", shapes, config, seed=1)
    if base:
        write_checkpoint(out / "base", shapes, config, seed=0)
    if vision:
        for i in range(8):
            shapes[f"visual.blocks.{i}.mlp.fc1.weight"] = (5120, 1280)
        config = {**config, "architectures": ["Qwen2_5_VLForConditionalGeneration"]}
        config |= {"model_type": "qwen2_5_vl", "vision_config": {"depth": 8, "hidden_size": 1280}}
    write_checkpoint(out / "mllm", shapes, config, seed=2)
    made = [out / name for name in ("reasoner", "mllm", *(["base"] if base else []))]
    for path in made if base else []:
        write_tokenizer(path, vocab)
    return made


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, choices=sorted(LAYERS), default=3, help="GB, about")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--vision", action="store_true", help="give the mllm a vision tower")
    parser.add_argument("--base", action="store_true", help="also their ancestor, and tokenizers")
    parser.add_argument("--layers", type=int, help="instead of those of the size")
    parser.add_argument("--vocab", type=int, default=VOCAB)
    given = parser.parse_args()
    options = {"vision": given.vision, "base": given.base}
    print(*make(given.out, given.size, layers=given.layers, vocab=given.vocab, **options))
