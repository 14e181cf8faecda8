"""Random masks that depend on a key and a position alone: not on chunks, threads or device.

A counter-based generator: half of a 64-bit key is the start and half the stride of a walk over the
32-bit numbers, and the place reached is hashed by multiplications and shifts ("lowbias32" of C.
Wellons' hash prospector, without its last shift, which changes low bits only). Wrapping 32-bit
arithmetic gives the same bits everywhere, at a seventh of the cost of 64-bit arithmetic.

Shapes: n = entries of a chunk.
"""

from functools import lru_cache

import torch
from torch import Tensor

_MULTIPLIERS = (0x7FEB352D, 0x846CA68B)
_SHIFTS = (16, 15)


def mixed_key(key: int, stream: int) -> int:
    """A 64-bit key for one of several streams under one key (splitmix64's finalizer)."""
    word = (key + (stream + 1) * 0x9E3779B97F4A7C15) % 2**64
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        word = (word ^ (word >> shift)) * factor % 2**64
    return word ^ (word >> 31)


def hashes(key: int, begin: int, numel: int, device: torch.device | str = "cpu") -> Tensor:
    """Hashes of positions begin, ..., begin + numel - 1: shape (numel,), int32, uniform.

    The key should be well mixed: take one from `mixed_key`. The low 16 bits are the worse half;
    compare, do not take remainders. Positions wrap at 2**32.
    """
    stride = (key >> 32) | 1  # odd, so that 2**32 steps visit every number once
    word = torch.mul(_ramp(numel, torch.device(device)), _signed(stride))
    word.add_(_signed(begin * stride + key))
    other = torch.empty_like(word)
    for shift, factor in zip(_SHIFTS, _MULTIPLIERS, strict=True):
        # The shift of a signed number repeats its sign; the mask makes it a plain one.
        torch.bitwise_right_shift(word, shift, out=other)
        word.bitwise_xor_(other.bitwise_and_(2 ** (32 - shift) - 1)).mul_(_signed(factor))
    return word


def keep_mask(key: int, begin: int, density: float, like: Tensor) -> Tensor:
    """1.0 with probability `density`, else 0.0, for the entries of `like`.

    Args:
        key: 64 bits, from `mixed_key`.
        begin: position of the first entry in its tensor.
        density: in [0, 1]; rounded to a multiple of 2**-32.
        like: shape (n,); gives length, dtype and device.
    """
    if density >= 1.0:
        return torch.ones_like(like)
    words = hashes(key, begin, like.numel(), like.device)
    return words.lt_(_threshold(density)).to(like.dtype)


def uniform(key: int, begin: int, like: Tensor) -> Tensor:
    """Numbers in [0, 1), multiples of 2**-24, one per entry of `like`; its dtype and device."""
    words = hashes(key, begin, like.numel(), like.device)
    return words.bitwise_right_shift_(8).add_(2**23).to(like.dtype).mul_(2.0**-24)


@lru_cache(maxsize=4)
def _ramp(numel: int, device: torch.device) -> Tensor:
    """0, 1, ..., numel - 1; never written to."""
    with torch.inference_mode(False):
        return torch.arange(numel, dtype=torch.int32, device=device)


def _threshold(density: float) -> int:
    return min(round(density * 2**32) - 2**31, 2**31 - 1)


def _signed(word: int) -> int:
    """The low 32 bits as a signed number."""
    return (word + 2**31) % 2**32 - 2**31
