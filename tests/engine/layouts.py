"""One logical decoder, stored in any layout."""

from tests import checkpoints as c
from tests.names import families as f
from tests.names.naive import naive_experts, naive_fused, naive_internlm

LAYOUTS = {
    "split": dict,
    "fused": naive_fused,
    "experts": lambda split: naive_experts(split, transposed=False),
    "experts_transposed": lambda split: naive_experts(split, transposed=True),
    "internlm": naive_internlm,
}
CONFIG = {"num_key_value_heads": f.KV, "num_hidden_layers": 3, "hidden_size": f.H}
VISION = {"visual.patch_embed.weight": (3, 4)}


def logical(seed, tails):
    """A llama-like decoder of split tensors as float32 arrays that bfloat16 holds exactly."""
    shapes = f.decoder(tails=tails)
    # A seed of its own for each: layers that are equal in both models would share their masks.
    return {
        name: c.random_tensors({name: shape}, seed + 100 * number)[name].values
        for number, (name, shape) in enumerate(shapes.items())
    }


def stored(arrays, layout):
    return {n: c.store(v) for n, v in LAYOUTS[layout](arrays).items()}


def write(directory, name, tensors, config=CONFIG):
    return c.write_checkpoint(directory / name, tensors, config)
