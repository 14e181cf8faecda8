"""Where transformers puts the tensors of the disk: the model's own conversion, asked by name.

transformers 5 renames, stacks and cuts tensors while it loads them; a model keeps the list in
`_weight_conversions`. It is followed here with names and shapes alone. transformers is not
imported: where a model is one of its own, its modules are there already. Tested with 5.24.
"""

import copy
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any

from torch import nn

from drift_merge.names.layouts import strip_wrappers
from drift_merge.names.tensors import Part, Shape
from drift_merge.training.match.boxes import Layout, cut, deal, join, parts_of, stack, swap, whole

_Pieces = dict[str, list[Layout]]  # by pattern, as the operations pass them on
_NUMBER = re.compile(r"\d+")


@dataclass(frozen=True, slots=True)
class Converted:
    """A tensor in memory and the tensors of the disk that it is made of."""

    memory: str  # name in memory
    parts: tuple[Part, ...]  # of the disk's tensors, by their stored names; cover it once


@dataclass(frozen=True, slots=True)
class _Substitution:
    """An entry of `_checkpoint_conversion_mapping` (transformers 4)."""

    pattern: str
    replacement: str

    def rename_source_key(self, key: str) -> tuple[str, None]:
        return re.sub(self.pattern, self.replacement, key), None


def convert(
    model: nn.Module, memory: Mapping[str, Shape], stored: Mapping[str, Shape]
) -> list[Converted]:
    """Follow stored tensors into a model of transformers.

    Args:
        model: wrapped or not.
        memory: name in memory, wrappers included -> shape.
        stored: name on the disk -> shape.

    Returns:
        What is certain: the name exists and the shape is right. Empty if the model is none of
        transformers, or its conversion says nothing of these names.
    """
    found = _find_model(model)
    if found is None:
        return []
    path, inner = found
    prefix = f"{path}." if path else ""
    inside = {strip_wrappers(n[len(prefix) :]): n for n in memory if n.startswith(prefix)}
    shapes = {name: memory[full] for name, full in inside.items()}
    best: list[Converted] = []
    for transforms in _conversions(inner):
        # Copies, since a transform remembers whether it was used: saving depends on it.
        layouts = _Follow(inner, copy.deepcopy(transforms), shapes).layouts(stored)
        lines = [
            Converted(inside[name], parts_of(layout))
            for name, layout in layouts.items()
            if shapes.get(name) == layout.shape
        ]
        if len(lines) > len(best):
            best = lines
        if stored.keys() == {part.name for line in best for part in line.parts}:
            break
    return best


def _find_model(model: nn.Module) -> tuple[str, nn.Module] | None:
    """The outermost module that transformers can load, and where it is."""
    for path, module in model.named_modules():
        if "_weight_conversions" in vars(module) or any(
            kind.__name__ == "PreTrainedModel" for kind in type(module).__mro__
        ):
            return path, module
    return None


def _conversions(model: nn.Module) -> Iterable[list[Any]]:
    """The conversion that the model was loaded by, then all that are known for it."""
    yield list(vars(model).get("_weight_conversions") or ())
    module = sys.modules.get("transformers.conversion_mapping")
    known: Callable[[nn.Module], list[Any]] | None
    known = getattr(module, "get_model_conversion_mapping", None)
    if known is not None and hasattr(model, "base_model_prefix") and hasattr(model, "config"):
        yield list(known(model))
    mapping = getattr(model, "_checkpoint_conversion_mapping", None)
    if isinstance(mapping, dict) and mapping:
        yield [_Substitution(pattern, new) for pattern, new in mapping.items()]


class _Follow:
    """One conversion at work on names."""

    def __init__(
        self, model: nn.Module, transforms: Sequence[Any], memory: Mapping[str, Shape]
    ) -> None:
        self._renamings = [t for t in transforms if not hasattr(t, "operations")]
        self._converters = [t for t in transforms if hasattr(t, "operations")]
        self._prefix = str(getattr(model, "base_model_prefix", ""))
        self._memory = memory

    def layouts(self, stored: Mapping[str, Shape]) -> dict[str, Layout]:
        """Name in memory -> what it is made of."""
        found: dict[str, Layout] = {}
        collected: dict[str, tuple[Any, dict[str, list[str]]]] = {}
        for name in sorted(stored, key=_natural):  # the order in which transformers loads
            target, converter, pattern = self._rename(name)
            if converter is None:
                found[target] = whole(name, stored[name])
            else:
                _, sources = collected.setdefault(target, (converter, {}))
                sources.setdefault(pattern, []).append(name)
        for target, (converter, sources) in collected.items():
            pieces = {p: [whole(n, stored[n]) for n in names] for p, names in sources.items()}
            found.update(self._operate(target, converter, pieces))
        return found

    def _rename(self, name: str) -> tuple[str, Any, str]:
        """Name in memory, converter (or None) and its pattern."""
        renamed = name
        for renaming in self._renamings:
            renamed, _ = renaming.rename_source_key(renamed)
        for converter in self._converters:
            target, pattern = converter.rename_source_key(renamed)
            if pattern is not None:
                return self._prefixed(target), converter, pattern
        target = self._prefixed(renamed)
        if target not in self._memory and self._prefixed(name) in self._memory:
            return self._prefixed(name), None, ""
        return target, None, ""

    def _prefixed(self, name: str) -> str:
        """With or without the prefix of the base model, whichever there is."""
        if name in self._memory or not self._prefix:
            return name
        for other in (name.removeprefix(f"{self._prefix}."), f"{self._prefix}.{name}"):
            if other in self._memory:
                return other
        return name

    def _operate(self, target: str, converter: Any, pieces: _Pieces) -> dict[str, Layout]:
        """What a converter makes of its tensors; nothing if it does more than move them."""
        names: list[str] = list(converter.target_patterns)
        outputs = {name: target.replace(names[0], name) for name in names}
        shapes = {name: self._memory.get(full) for name, full in outputs.items()}
        try:
            for operation in converter.operations:
                step = _OPERATIONS.get(type(operation).__name__)
                if step is None:
                    return {}
                pieces = step(operation, pieces, list(converter.source_patterns), shapes)
        except (ValueError, IndexError):  # not all of the tensors are there
            return {}
        return {outputs[name]: found[0] for name, found in pieces.items() if name in outputs}


_Shapes = Mapping[str, Shape | None]  # target pattern -> shape in memory


def _merge(op: Any, pieces: _Pieces, sources: list[str], targets: _Shapes) -> _Pieces:
    """A list of modules (experts) becomes one tensor."""
    return {_key(p, pieces, targets): [stack(found, op.dim)] for p, found in pieces.items()}


def _concatenate(op: Any, pieces: _Pieces, sources: list[str], targets: _Shapes) -> _Pieces:
    (target,) = targets
    return {target: [join([one for p in sources for one in pieces.get(p, [])], op.dim)]}


def _chunk(op: Any, pieces: _Pieces, sources: list[str], targets: _Shapes) -> _Pieces:
    if getattr(op, "num_shards_attribute", None) is not None:
        raise ValueError("the number of chunks is in the config")
    ((layout,),) = pieces.values()
    total = layout.shape[op.dim]
    size = ceil(total / len(targets))
    sizes = [min(size, total - begin) for begin in range(0, total, size)]
    return _named(targets, cut(layout, op.dim, sizes))


def _split(op: Any, pieces: _Pieces, sources: list[str], targets: _Shapes) -> _Pieces:
    ((layout,),) = pieces.values()
    sizes = [shape[op.dim] for shape in targets.values() if shape is not None]
    return _named(targets, cut(layout, op.dim, sizes))


def _transpose(op: Any, pieces: _Pieces, sources: list[str], targets: _Shapes) -> _Pieces:
    ((pattern, (layout,)),) = pieces.items()
    target = _key(pattern, pieces, targets)
    if op.check_dims and layout.shape == targets.get(target):
        return {target: [layout]}
    return {target: [swap(layout, op.dim0, op.dim1)]}


def _interleave(op: Any, pieces: _Pieces, sources: list[str], targets: _Shapes) -> _Pieces:
    if op.inverse:
        raise ValueError("transformers does this only when it saves")
    ((layout,),) = pieces.values()
    return {next(iter(targets)): [deal(layout, op.dim)]}


def _ernie(op: Any, pieces: _Pieces, sources: list[str], targets: _Shapes) -> _Pieces:
    """One list of experts: first those of text, then those of vision."""
    found: _Pieces = {}
    begin = 0
    for target, shape in targets.items():
        end = begin + (shape[op.stack_dim] if shape else 0)
        groups = [pieces[pattern][begin:end] for pattern in sources]
        if shape is not None and all(groups):
            found[target] = [join([stack(g, op.stack_dim) for g in groups], op.concat_dim)]
        begin = end
    return found


_OPERATIONS: dict[str, Callable[[Any, _Pieces, list[str], _Shapes], _Pieces]] = {
    "MergeModulelist": _merge,
    "Concatenate": _concatenate,
    "Chunk": _chunk,
    "Split": _split,
    "Transpose": _transpose,
    "Interleave": _interleave,
    "ErnieFuseAndSplitTextVisionExperts": _ernie,
}


def _key(pattern: str, pieces: _Pieces, targets: _Shapes) -> str:
    """A single tensor takes the name of its target; others keep theirs for the next step."""
    return next(iter(targets)) if len(pieces) == len(targets) == 1 else pattern


def _named(targets: Iterable[str], layouts: Sequence[Layout]) -> _Pieces:
    return {name: [layout] for name, layout in zip(targets, layouts, strict=True)}


def _natural(name: str) -> list[tuple[bool, int, str]]:
    """Numbers by their value: experts.2 before experts.10."""
    return [
        (not part.isdigit(), int(part) if _NUMBER.fullmatch(part) else 0, part)
        for part in name.split(".")
    ]
