"""Small checkpoints for tests: a Qwen2-like reasoner and a Qwen2.5-VL-like mllm, by numpy alone.

Nothing here imports torch or the package under test, so that a bug in its writer cannot hide a
bug in its reader. A `Stored` tensor is (dtype code, shape, bytes), exactly what lies on the disk.
"""

import json
import struct
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

HIDDEN, INTERMEDIATE, HEADS, KV_HEADS, VOCABULARY = 16, 24, 4, 2, 40
KV = HIDDEN // HEADS * KV_HEADS
VISION = 8

_NUMPY = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "I64": np.int64,
    "I32": np.int32,
    "I8": np.int8,
    "U8": np.uint8,
    "BOOL": np.bool_,
}

SIDECARS: dict[str, bytes] = {
    "generation_config.json": b'{"do_sample": false}\n',
    "chat_template.jinja": b"{% for message in messages %}{{ message }}{% endfor %}\n",
    "preprocessor_config.json": b'{"patch_size": 14}\n',
    "LICENSE": b"Apache License 2.0\n",
    "remote/modeling_tiny.py": b"raise RuntimeError('remote code must not be run')\n",
}


def _float8(code: int) -> float:
    """float8_e4m3fn by its definition: sign, four bits of exponent (bias 7), three of fraction."""
    sign = -1.0 if code & 0x80 else 1.0
    exponent, fraction = code >> 3 & 0xF, code & 7
    if code & 0x7F == 0x7F:
        return float("nan")  # the only one; there is no infinity
    if exponent == 0:
        return sign * fraction * 2.0**-9
    return sign * (1 + fraction / 8) * 2.0 ** (exponent - 7)


FLOAT8 = np.array([_float8(code) for code in range(256)], np.float32)  # every value, by its code


class Stored(NamedTuple):
    """One tensor as it lies in a safetensors file."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes

    @property
    def values(self) -> np.ndarray:
        """The values as a numpy array; bfloat16 and float8 are widened to float32 exactly."""
        if self.dtype == "F8_E4M3":
            return FLOAT8[np.frombuffer(self.data, np.uint8)].reshape(self.shape)
        if self.dtype == "BF16":
            wide = np.frombuffer(self.data, np.uint16).astype(np.uint32) << 16
            return wide.view(np.float32).reshape(self.shape)
        return np.frombuffer(self.data, _NUMPY[self.dtype]).reshape(self.shape)


Tensors = dict[str, Stored]
Shapes = dict[str, tuple[int, ...]]


class Pair(NamedTuple):
    """Two checkpoint directories."""

    reasoner: Path
    mllm: Path

    @property
    def arguments(self) -> list[str]:
        """Both as a command line takes them."""
        return [str(self.reasoner), str(self.mllm)]


def store(values: Any, dtype: str = "BF16") -> Stored:
    """Values (anything numpy takes) in a dtype; bfloat16 by rounding to nearest even."""
    array = np.asarray(values)
    if dtype != "BF16":
        return Stored(dtype, array.shape, array.astype(_NUMPY[dtype]).tobytes())
    array = array.astype(np.float32)
    bits = array.view(np.uint32) if array.shape else array.reshape(1).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    rounded = np.where(np.isnan(array), 0x7FC0, rounded).astype(np.uint16)
    return Stored("BF16", array.shape, rounded.tobytes())


def text_shapes(layers: int = 2, prefix: str = "model.", *, tied: bool = False) -> Shapes:
    """The tensors of the text tower as Qwen2 and Qwen2.5-VL store them."""
    shapes: Shapes = {
        f"{prefix}embed_tokens.weight": (VOCABULARY, HIDDEN),
        f"{prefix}norm.weight": (HIDDEN,),
    }
    if not tied:
        shapes["lm_head.weight"] = (VOCABULARY, HIDDEN)
    for layer in range(layers):
        at = f"{prefix}layers.{layer}."
        shapes[f"{at}input_layernorm.weight"] = (HIDDEN,)
        shapes[f"{at}post_attention_layernorm.weight"] = (HIDDEN,)
        for name, rows in (("q", HIDDEN), ("k", KV), ("v", KV)):
            shapes[f"{at}self_attn.{name}_proj.weight"] = (rows, HIDDEN)
            shapes[f"{at}self_attn.{name}_proj.bias"] = (rows,)
        shapes[f"{at}self_attn.o_proj.weight"] = (HIDDEN, HIDDEN)
        shapes[f"{at}mlp.gate_proj.weight"] = (INTERMEDIATE, HIDDEN)
        shapes[f"{at}mlp.up_proj.weight"] = (INTERMEDIATE, HIDDEN)
        shapes[f"{at}mlp.down_proj.weight"] = (HIDDEN, INTERMEDIATE)
    return shapes


def vision_shapes(depth: int = 1) -> Shapes:
    """The vision tower and the merger as Qwen2.5-VL stores them."""
    shapes: Shapes = {"visual.patch_embed.proj.weight": (VISION, 3, 2, 2, 2)}
    for layer in range(depth):
        at = f"visual.blocks.{layer}."
        shapes[f"{at}norm1.weight"] = (VISION,)
        shapes[f"{at}norm2.weight"] = (VISION,)
        shapes[f"{at}attn.qkv.weight"] = (3 * VISION, VISION)
        shapes[f"{at}attn.qkv.bias"] = (3 * VISION,)
        shapes[f"{at}attn.proj.weight"] = (VISION, VISION)
        shapes[f"{at}attn.proj.bias"] = (VISION,)
        shapes[f"{at}mlp.down_proj.weight"] = (VISION, 2 * VISION)
        shapes[f"{at}mlp.up_proj.weight"] = (2 * VISION, VISION)
    shapes["visual.merger.mlp.0.weight"] = (4 * VISION, 4 * VISION)
    shapes["visual.merger.mlp.2.weight"] = (HIDDEN, 4 * VISION)
    return shapes


def text_config(layers: int = 2, **changes: Any) -> dict[str, Any]:
    """`config.json` of the reasoner."""
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "vocab_size": VOCABULARY,
        "rope_theta": 1000000.0,
        "rms_norm_eps": 1e-06,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    } | changes


def mllm_config(layers: int = 2, **changes: Any) -> dict[str, Any]:
    """`config.json` of the mllm."""
    own = {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]},
        "vision_config": {"depth": 1, "hidden_size": VISION, "out_hidden_size": HIDDEN},
    }
    return text_config(layers) | own | changes


def random_tensors(shapes: Shapes, seed: int, *, dtype: str = "BF16") -> Tensors:
    """Normal values around an ancestor that depends on the name alone: relatives, not twins."""
    tensors = {}
    for name, shape in shapes.items():
        key = int.from_bytes(name.encode()[-24:], "little") % 2**63
        ancestor = np.random.default_rng(key).normal(0, 0.02, shape)
        own = np.random.default_rng([seed, key]).normal(0, 0.004, shape)
        tensors[name] = store(ancestor + own, dtype)
    return tensors


def reasoner_tensors(layers: int = 2, *, seed: int = 1, dtype: str = "BF16") -> Tensors:
    """All tensors of a reasoner."""
    return random_tensors(text_shapes(layers), seed, dtype=dtype)


def mllm_tensors(layers: int = 2, *, seed: int = 2, dtype: str = "BF16") -> Tensors:
    """All tensors of an mllm."""
    return random_tensors(text_shapes(layers) | vision_shapes(), seed, dtype=dtype)


def shard_bytes(header: Any, data: bytes = b"", *, length: int | None = None) -> bytes:
    """A safetensors file, honest or not.

    Args:
        header: plain data to be written as JSON, or the bytes themselves.
        data: what follows.
        length: what the first 8 bytes claim; the truth if None.
    """
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def write_shard(path: Path, tensors: Tensors) -> None:
    """One honest safetensors file."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, (dtype, shape, data) in tensors.items():
        offsets = [at, at + len(data)]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": offsets}
        at += len(data)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(shard_bytes(text, b"".join(tensor.data for tensor in tensors.values())))


def write_checkpoint(
    directory: Path,
    tensors: Tensors,
    config: Mapping[str, Any] | None,
    *,
    num_shards: int = 1,
    sidecars: Mapping[str, bytes] | None = None,
) -> Path:
    """Write a checkpoint directory.

    Args:
        directory: created.
        tensors: in the order of the files.
        config: `config.json`; None leaves it out.
        num_shards: 1: `model.safetensors`; more: that many shards and an index.
        sidecars: other files by relative path.
    """
    directory.mkdir(parents=True)
    if config is not None:
        (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    for name, data in (sidecars or {}).items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(data)
    if num_shards == 1:
        write_shard(directory / "model.safetensors", tensors)
        return directory
    names = list(tensors)
    weight_map = {}
    for number in range(num_shards):
        shard = f"model-{number + 1:05d}-of-{num_shards:05d}.safetensors"
        some = names[number::num_shards]  # round robin: neighbors lie in different files
        write_shard(directory / shard, {name: tensors[name] for name in some})
        weight_map |= dict.fromkeys(some, shard)
    write_index(directory, weight_map, sum(len(t.data) for t in tensors.values()))
    return directory


def write_index(directory: Path, weight_map: Mapping[str, Any], total_size: int = 0) -> None:
    """`model.safetensors.index.json`."""
    index = {"metadata": {"total_size": total_size}, "weight_map": dict(weight_map)}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def make_pair(
    directory: Path,
    *,
    layers: int = 2,
    dtype: str = "BF16",
    num_shards: int | tuple[int, int] = 1,
    reasoner: Mapping[str, Stored | None] | None = None,
    mllm: Mapping[str, Stored | None] | None = None,
    reasoner_config: Mapping[str, Any] | None = None,
    mllm_config_changes: Mapping[str, Any] | None = None,
    reasoner_sidecars: Mapping[str, bytes] | None = None,
    mllm_sidecars: Mapping[str, bytes] | None = None,
) -> Pair:
    """Write `directory`/reasoner and `directory`/mllm; the same bytes every time.

    Args:
        directory: where.
        layers: of the tower.
        dtype: of every tensor.
        num_shards: of both, or (reasoner, mllm).
        reasoner: tensors to add or replace by name; None takes one away.
        mllm: likewise.
        reasoner_config: keys to change in its config.json.
        mllm_config_changes: likewise.
        reasoner_sidecars: other files by relative path, e.g. {"tokenizer.json": tokenizer()}.
        mllm_sidecars: likewise; `SIDECARS` is a set of the usual ones.
    """
    shards = num_shards if isinstance(num_shards, tuple) else (num_shards, num_shards)
    return Pair(
        write_checkpoint(
            directory / "reasoner",
            _changed(reasoner_tensors(layers, dtype=dtype), reasoner),
            text_config(layers, **(reasoner_config or {})),
            num_shards=shards[0],
            sidecars=reasoner_sidecars,
        ),
        write_checkpoint(
            directory / "mllm",
            _changed(mllm_tensors(layers, dtype=dtype), mllm),
            mllm_config(layers, **(mllm_config_changes or {})),
            num_shards=shards[1],
            sidecars=mllm_sidecars,
        ),
    )


def _changed(tensors: Tensors, changes: Mapping[str, Stored | None] | None) -> Tensors:
    joined = tensors | dict(changes or {})
    return {name: tensor for name, tensor in joined.items() if tensor is not None}


def tokenizer(words: list[str] | None = None) -> bytes:
    """A `tokenizer.json` of whole words; row i of the embedding belongs to words[i]."""
    words = words if words is not None else [f"word{i}" for i in range(VOCABULARY)]
    value = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {"type": "Whitespace"},
        "post_processor": None,
        "decoder": None,
        "model": {
            "type": "WordLevel",
            "vocab": {word: i for i, word in enumerate(words)},
            "unk_token": words[0],
        },
    }
    return json.dumps(value).encode()


def read_shard(path: Path) -> Tensors:
    """Every tensor of one safetensors file, in the order of its header."""
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    tensors = {}
    for name, entry in header.items():
        if name != "__metadata__":
            begin, end = (8 + length + offset for offset in entry["data_offsets"])
            tensors[name] = Stored(entry["dtype"], tuple(entry["shape"]), raw[begin:end])
    return tensors


def read_tensors(directory: Path) -> Tensors:
    """Every tensor of a directory of safetensors files, by sorted name."""
    found: Tensors = {}
    for path in sorted(directory.glob("*.safetensors")):
        found |= read_shard(path)
    return dict(sorted(found.items()))


def read_files(directory: Path) -> dict[str, bytes]:
    """Every file below a directory, by relative path: what `byte-identical` is asserted on."""
    paths = sorted(path for path in directory.rglob("*") if path.is_file())
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in paths}


def numel(shapes: Shapes) -> int:
    """Number of elements of all shapes."""
    return sum(prod(shape) for shape in shapes.values())
