"""What a model of transformers knows of its names on the disk, in plain Python.

The classes behave as those of transformers 5.24 where attach asks them: `rename_source_key`,
`source_patterns`, `target_patterns`, `operations`. tests/real_models has the originals.
"""

import re
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor


class Renaming:
    """A WeightRenaming: remembers, as that does, whether it was used."""

    def __init__(self, pattern: str, replacement: str) -> None:
        self.pattern, self.replacement, self.was_used = pattern, replacement, False

    def rename_source_key(self, key: str) -> tuple[str, str | None]:
        renamed, count = re.subn(self.pattern, self.replacement, key, count=1)
        self.was_used |= bool(count)
        return renamed, self.pattern if count else None


class Guarded(Renaming):
    """A GroupWeightRename: ln1 -> ln2 only where there is an ln0 that becomes ln1."""

    def __init__(self) -> None:
        super().__init__(r"norm0", "norm1")
        self.is_active = False

    def rename_source_key(self, key: str) -> tuple[str, str | None]:
        self.is_active |= "norm0" in key
        if "norm1" in key and self.is_active:
            return key.replace("norm1", "norm2"), "norm1"
        return super().rename_source_key(key)


class Converter:
    """A WeightConverter; `*` is any number."""

    def __init__(self, sources: list[str], targets: list[str], *operations: Any) -> None:
        self.source_patterns, self.target_patterns = sources, targets
        self.operations = list(operations)

    def rename_source_key(self, key: str) -> tuple[str, str | None]:
        for source in self.source_patterns:
            expression = re.escape(source).replace(r"\*", r"\d+")
            if found := re.search(expression, key):
                return key.replace(found[0], self.target_patterns[0], 1), source
        return key, None


def operation(kind: str, **values: Any) -> Any:
    """One of transformers' ConversionOps: known by the name of its class."""
    return type(kind, (SimpleNamespace,), {})(**values)


def stack(dim: int = 0) -> Any:
    return operation("MergeModulelist", dim=dim)


def join(dim: int) -> Any:
    return operation("Concatenate", dim=dim)


def experts(tensors: dict[str, Tensor], pattern: str, count: int) -> Tensor:
    """(E, ...) from tensors called by `pattern` with a number for `*`."""
    return torch.stack([tensors[pattern.replace("*", str(e))] for e in range(count)])
