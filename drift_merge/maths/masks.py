"""Random masks that depend on a key and a position alone: not on chunks, threads or device.

A counter-based generator of 32-bit words. Positions lie in blocks of 2**16. Under a key every
place in a block has a well hashed number ("lowbias32" of C. Wellons' hash prospector, over a walk
that starts at one half of the key and strides by the other), and every block an odd factor and a
summand of its own; the word is number * factor + summand. So a mask costs two operations per
entry, where hashing each position takes ten. Wrapping 32-bit arithmetic is the same everywhere.

Shapes: n = entries of a chunk.
"""

from functools import lru_cache

import torch
from torch import Tensor

_MULTIPLIERS = (0x7FEB352D, 0x846CA68B)
_SHIFTS = (16, 15, 16)
_BLOCK = 2**16


def mixed_key(key: int, stream: int) -> int:
    """A 64-bit key for one of several streams under one key (splitmix64's finalizer)."""
    word = (key + (stream + 1) * 0x9E3779B97F4A7C15) % 2**64
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        word = (word ^ (word >> shift)) * factor % 2**64
    return word ^ (word >> 31)


def hashes(key: int, begin: int, numel: int, device: torch.device | str = "cpu") -> Tensor:
    """Hashes of positions begin, ..., begin + numel - 1: shape (numel,), int32, uniform.

    The key should be well mixed: take one from `mixed_key`. The high bits are the better ones:
    compare, do not take remainders.
    """
    table = _table(key, torch.device(device))
    end, words = begin + numel, torch.empty(numel, dtype=torch.int32, device=device)
    while begin < end:
        block, first = divmod(begin, _BLOCK)
        whole = 0 if first else (end - begin) // _BLOCK
        size = min(_BLOCK - first, end - begin) if whole < 2 else whole * _BLOCK
        out = words[numel - (end - begin) :][:size]
        if whole < 2:
            factor, summand = _block_key(key, block)
            torch.mul(table[first : first + size], factor, out=out).add_(summand)
        else:  # for a GPU, where every operation costs a launch
            pairs = [_block_key(key, block + i) for i in range(whole)]
            factors, summands = torch.tensor(pairs, dtype=torch.int32, device=device).T
            torch.mul(table, factors[:, None], out=out.view(whole, -1)).add_(summands[:, None])
        begin += size
    return words


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


@lru_cache(maxsize=8)  # one tensor has a key per model
def _table(key: int, device: torch.device) -> Tensor:
    """The hashed numbers of the places in a block: shape (2**16,), int32; never written to."""
    with torch.inference_mode(False):
        word = torch.arange(_BLOCK, dtype=torch.int32, device=device)
        word.mul_(_signed((key >> 32) | 1)).add_(_signed(key))  # odd strides visit every number
        for shift, factor in zip(_SHIFTS, (*_MULTIPLIERS, 1), strict=True):
            # The shift of a signed number repeats its sign; the mask makes it a plain one.
            shifted = (word >> shift).bitwise_and_(2 ** (32 - shift) - 1)
            word.bitwise_xor_(shifted).mul_(_signed(factor))
        return word


@lru_cache(maxsize=64)
def _block_key(key: int, block: int) -> tuple[int, int]:
    """Factor and summand of a block: signed 32-bit numbers, the factor odd."""
    word = mixed_key(key, block)
    return _signed(word >> 32 | 1), _signed(word)


def _threshold(density: float) -> int:
    return min(round(density * 2**32) - 2**31, 2**31 - 1)


def _signed(word: int) -> int:
    """The low 32 bits as a signed number."""
    return (word + 2**31) % 2**32 - 2**31
