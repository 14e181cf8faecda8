"""What the tests of compressed priors share."""

import numpy as np

CODES = {"int8": "I8", "float8_e4m3fn": "F8_E4M3"}


UP = "layers.0.mlp.up_proj.weight"


ALL = 10**6  # a sample of all tensors


def values_of(tensors, name):
    """A delta as it is stored, float32, by numpy alone."""
    stored = tensors[name]
    if f"{name}:scale" not in tensors:
        return stored.values.astype(np.float32)
    scales = tensors[f"{name}:scale"].values
    return stored.values.astype(np.float32) * scales[..., None]


def shards_of(directory):
    return {p.name: p.read_bytes() for p in sorted(directory.glob("*.safetensors"))}


def sources(pair):
    return {"reasoner": str(pair.reasoner), "mllm": str(pair.mllm)}
