"""Which modules an adapter's fields adapt, with which rank and scale; as PEFT decides it.

Sources: `check_target_module_exists` (peft/tuners/tuners_utils.py) and `get_pattern_key`
(peft/utils/other.py) of PEFT 0.21; LoRA, arXiv 2106.09685, section 4.1 (s = alpha / r); rsLoRA,
arXiv 2312.03732 (s = alpha / sqrt(r)).
"""

import re
from collections.abc import Iterable, Mapping
from math import sqrt
from typing import TypeVar

from drift_merge.storage.adapters.fields import AdapterConfig

ALL_LINEAR = "all-linear"  # PEFT's word for every linear layer but the head
_NUMBER = r".*?\.[^.]*\.(\d+)\."

T = TypeVar("T")


def find_pattern(patterns: Mapping[str, T], module: str, otherwise: T) -> T:
    """The value of the first pattern that matches the end of a module's name, from a dot on.

    >>> find_pattern({"q_proj|k_proj": 64, "layers.0.q_proj": 2}, "layers.0.q_proj", 8)
    64
    """
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return otherwise


def rank_of(config: AdapterConfig, module: str) -> int:
    """The rank that the fields give a module."""
    return find_pattern(config.ranks, module, config.rank)


def scale_of(config: AdapterConfig, module: str) -> float:
    """s in W = W_base + s * B @ A."""
    rank = rank_of(config, module)
    alpha = find_pattern(config.alphas, module, config.alpha)
    return alpha / (sqrt(rank) if config.use_rslora else rank)


def is_adapted(config: AdapterConfig, module: str) -> bool:
    """Whether the fields say that a module (named as in memory) has factors."""
    if _ends_with(config.excluded, module):
        return False
    # A module that is saved whole, or lies in one, has no factors.
    if any(re.match(rf"(^|.*\.){word}($|\..*)", module) for word in config.saved):
        return False
    if config.targets in (ALL_LINEAR, ()):  # (): then what is stored says it
        return True
    if not _ends_with(config.targets, module):
        return False
    if isinstance(config.targets, str) or module in config.targets or not config.layers:
        return True
    return _layer_of(config, module) in config.layers


def is_saved(words: Iterable[str], tensor: str) -> bool:
    """Whether a tensor belongs to a module that one of `modules_to_save` names by its end."""
    ends = tuple(words)
    modules = tensor.split(".")[:-1]
    paths = [".".join(modules[:end]) for end in range(1, len(modules) + 1)]
    return any(path.endswith(ends) for path in paths)


def _ends_with(wanted: str | tuple[str, ...], module: str) -> bool:
    if isinstance(wanted, str):
        return re.fullmatch(wanted, module) is not None
    return any(module == word or module.endswith(f".{word}") for word in wanted)


def _layer_of(config: AdapterConfig, module: str) -> int | None:
    patterns = [rf"(?:^|.*?\.){word}\.(\d+)\." for word in config.lists] or [_NUMBER]
    for pattern in patterns:
        if found := re.match(pattern, module):
            return int(found[1])
    return None
