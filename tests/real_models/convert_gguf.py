"""Turn a GGUF file of the llama or qwen2 architecture into a Hugging Face checkpoint.

Quantized tensors are dequantized, so the result is a real model with the weights the quantized
file stands for, not the ones it was made from. Pure functions down to `convert`, which writes.

    python tests/real_models/convert_gguf.py model.gguf out/
"""

import argparse
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFReader
from gguf.quants import dequantize
from safetensors.torch import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

NAMES = {  # GGUF -> Hugging Face
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}
TIED_OUTPUT = "output.weight"  # absent from the file where embedding and head share one matrix
SPECIAL, USER_DEFINED, UNUSED = 3, 4, 5  # tokenizer.ggml.token_type
QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def huggingface_name(name: str) -> str:
    """Rename one tensor.

    >>> huggingface_name("blk.3.attn_q.bias")
    'model.layers.3.self_attn.q_proj.bias'
    """
    layer, stem, kind = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", name).groups()
    prefix = "" if layer is None else f"model.layers.{layer}."
    return f"{prefix}{NAMES[stem]}.{kind}"


def undo_permutation(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """Give the rows of a llama q or k projection (heads * d, in) their Hugging Face order back.

    GGUF interleaves the two halves that rotate together; Hugging Face keeps the halves apart.
    """
    rows, *rest = weight.shape
    half = rows // num_heads // 2
    return weight.reshape(num_heads, half, 2, *rest).swapaxes(1, 2).reshape(weight.shape)


def read_fields(reader: GGUFReader) -> dict[str, Any]:
    """Read every key of the GGUF header as a Python value."""
    return {key: field.contents() for key, field in reader.fields.items()}


def model_config(fields: Mapping[str, Any], *, tied: bool) -> dict[str, Any]:
    """Build the config.json that the header describes, in the form model hubs carry."""
    arch = fields["general.architecture"]
    hidden, heads = fields[f"{arch}.embedding_length"], fields[f"{arch}.attention.head_count"]
    return {
        "architectures": [ARCHITECTURES[arch]],
        "model_type": arch,
        "hidden_size": hidden,
        "intermediate_size": fields[f"{arch}.feed_forward_length"],
        "num_hidden_layers": fields[f"{arch}.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": fields[f"{arch}.attention.head_count_kv"],
        "max_position_embeddings": fields[f"{arch}.context_length"],
        # The header has float32 values: 9.99999974e-06 stands for 1e-05.
        "rms_norm_eps": float(f"{fields[f'{arch}.attention.layer_norm_rms_epsilon']:.6g}"),
        "rope_theta": float(fields[f"{arch}.rope.freq_base"]),
        "vocab_size": len(fields["tokenizer.ggml.tokens"]),
        "hidden_act": "silu",
        "tie_word_embeddings": tied,
        "bos_token_id": fields["tokenizer.ggml.bos_token_id"],
        "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
        "pad_token_id": fields["tokenizer.ggml.padding_token_id"],
        "torch_dtype": "bfloat16",
    }


def build_tokenizer(fields: Mapping[str, Any]) -> PreTrainedTokenizerFast:
    """Rebuild the byte-level BPE tokenizer, special tokens and chat template."""
    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    vocabulary = {token: i for i, token in enumerate(tokens) if types[i] != UNUSED}
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    if fields["tokenizer.ggml.pre"] == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
        split = pre_tokenizers.Split(Regex(QWEN2_SPLIT), "isolated")
        bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    else:
        split = pre_tokenizers.Digits(individual_digits=True)
        bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens(
        [
            AddedToken(token, special=types[i] == SPECIAL, normalized=False)
            for i, token in enumerate(tokens)
            if types[i] in (SPECIAL, USER_DEFINED)
        ]
    )
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=tokens[fields["tokenizer.ggml.bos_token_id"]],
        eos_token=tokens[fields["tokenizer.ggml.eos_token_id"]],
        pad_token=tokens[fields["tokenizer.ggml.padding_token_id"]],
        clean_up_tokenization_spaces=False,
    )
    wrapped.chat_template = fields["tokenizer.chat_template"]
    return wrapped


def dequantized(reader: GGUFReader, fields: Mapping[str, Any]) -> Iterator[tuple[str, np.ndarray]]:
    """Yield (Hugging Face name, float32 array) for every tensor, one at a time."""
    arch = fields["general.architecture"]
    heads = {"attn_q": "head_count", "attn_k": "head_count_kv"}
    for tensor in reader.tensors:
        weight = dequantize(tensor.data, tensor.tensor_type)
        shape = tuple(int(n) for n in reversed(tensor.shape))  # GGUF stores shapes reversed
        stem = tensor.name.split(".")[-2]
        weight = weight.reshape(shape)
        if arch == "llama" and stem in heads:
            weight = undo_permutation(weight, fields[f"{arch}.attention.{heads[stem]}"])
        yield huggingface_name(tensor.name), weight


def convert(gguf: Path, out: Path) -> dict[str, Any]:
    """Write `out` as a bfloat16 checkpoint with tokenizer; return its config."""
    reader = GGUFReader(gguf)
    fields = read_fields(reader)
    tied = all(tensor.name != TIED_OUTPUT for tensor in reader.tensors)
    config = model_config(fields, tied=tied)
    weights = {
        # "W": tensors stored as float32 are read-only views of the file, which torch warns about.
        name: torch.from_numpy(np.require(weight, requirements=["C", "W"])).to(torch.bfloat16)
        for name, weight in dequantized(reader, fields)
    }
    out.mkdir(parents=True, exist_ok=True)
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    build_tokenizer(fields).save_pretrained(out)
    generation = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    for file, content in (("config.json", config), ("generation_config.json", generation)):
        (out / file).write_text(json.dumps(content, indent=2) + "\n")
    return config


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("gguf", type=Path)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    convert(arguments.gguf, arguments.out)
