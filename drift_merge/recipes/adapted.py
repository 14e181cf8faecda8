"""A LoRA adapter on its base as one checkpoint: W = W_base + s * B @ A, not yet computed.

The checkpoint lists the base's tensors and, for each that the adapter changes, where its factors
are; the engine adds the product chunk by chunk. An adapter knows the names that its base had in
memory, which need not be those on the disk.
"""

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from drift_merge.errors import AlignmentError
from drift_merge.names.layouts import HEADS, rename_tail, strip_wrappers
from drift_merge.names.lineage import has_vision_config, is_tied, text_config
from drift_merge.names.tensors import Model
from drift_merge.names.towers import Tower, canonical_names
from drift_merge.storage.adapters.factors import Factors, StoredTensors, read_factors
from drift_merge.storage.adapters.fields import AdapterConfig, read_adapter_config
from drift_merge.storage.adapters.refusals import damaged
from drift_merge.storage.adapters.selection import is_adapted
from drift_merge.storage.checkpoint import Checkpoint, StoredAdapter, assemble
from drift_merge.storage.folder.notes import CheckpointNote
from drift_merge.storage.headers import ShardHeader, TensorInfo
from drift_merge.storage.sources import Source
from drift_merge.storage.weight_map import ADAPTER_WEIGHTS

_NUMBERED = re.compile(r"(.*?)\.(\d+)\.(.+)")
# Parts of a tower's prefix that one side may have and the other not: of any model, of an MLLM.
_PLAIN = {"model", "transformer", ""}
_OF_TEXT = re.compile(r".*(?:lang|text|llm|thinker).*")
# transformers' Conv1D, which stores (inputs, outputs): its modules in the one text model that
# has it and a tower known here.
_CONV1D = {"gpt2": ("c_attn", "c_proj", "c_fc", "q_attn")}


def join_adapter(source: Source, base: Checkpoint) -> Checkpoint:
    """The base with the adapter's factors beside its tensors.

    Raises:
        CheckpointError: the adapter is of a kind that is not computed exactly, it is damaged, or
            it does not fit the base.
    """
    config = read_adapter_config(source)
    stored = read_factors(source, config)
    assert source.path is not None
    adapted = _Adapted(config, base)
    adapted.take(stored)
    shards = [_without(header, adapted.replaced) for header in _shards_of(base)]
    own = _absolute(source.path / ADAPTER_WEIGHTS, stored.header)
    shards.append(_as_base(own, adapted.replaced))
    joined = assemble(source, Path("/"), base.config, shards)
    remote = {shard.place: shard for shard in base.remote.values()}
    notes = (*base.notes, *(CheckpointNote("adapter", text) for text in adapted.notes()))
    return replace(joined, adapters=adapted.adapters, remote=remote, notes=notes)


@dataclass(frozen=True, slots=True)
class _Names:
    """The tower of a base by the part of its names that disk and memory share."""

    prefix: str  # of the list of layers on the disk, "model.layers"
    layers: Mapping[tuple[str, str], str]  # (number, tail in llama's words) -> stored name
    others: Mapping[str, str]  # embedding, norm and head: stored name -> canonical name


class _Adapted:
    """Finds the tensor of the base for everything that an adapter stores."""

    def __init__(self, config: AdapterConfig, base: Checkpoint) -> None:
        self._config, self._base = config, base
        self._is_mllm = has_vision_config(base.config)
        self._tower = _tower_of(base)
        self._names = _names_of(self._tower)
        self._outside: list[str] = []  # modules and tensors, as the adapter calls them
        self._prefixes: set[str] = set()  # of the list of layers, as the adapter calls it
        self.adapters: dict[str, StoredAdapter] = {}  # by stored name of the base
        self.replaced: dict[str, str] = {}  # stored name in the adapter -> in the base

    def take(self, stored: StoredTensors) -> None:
        """Pair factors and whole modules with the base."""
        for module, factors in stored.factors.items():
            name = self._place(module, f"{module}.weight")
            if name is not None:
                self._add_factors(module, name, factors)
        for tensor, info in stored.whole.items():
            name = self._place(tensor, tensor)
            if name is not None:
                self._add_whole(name, info)
        if not self.adapters and not self.replaced:
            raise self._config.reject(
                f"none of its {len(self._outside):,} modules is in the language tower of"
                f" {self._base.source.given}: {_examples(self._outside)}"
            )
        self._require_all(stored.factors)

    def notes(self) -> list[str]:
        """What the adapter changes and a merge of the tower does not."""
        if not self._outside:
            return []
        count = len(self._outside)
        many = "modules" if count > 1 else "module"
        return [
            f"{self._config.label} adapts {count:,} {many} outside the language tower, not used"
            f" here: {_examples(self._outside)}."
        ]

    def _place(self, shown: str, name: str) -> str | None:
        """The stored name of a tensor that the adapter names; None outside the tower."""
        found = name if name in self._base.tensors else None
        if found is None and self._names is not None:
            found = self._by_layer(name) or self._beside(name)
        if found is None and not self._is_mllm:
            raise self._config.reject(f"{shown} is no module of the base {self._base.source.given}")
        if found is None or (self._tower is not None and found not in self._tower.canonical):
            self._outside.append(shown)
            return None
        if match := _NUMBERED.fullmatch(name):
            self._prefixes.add(match[1])
        return found

    def _by_layer(self, name: str) -> str | None:
        assert self._names is not None
        match = _NUMBERED.fullmatch(name)
        if match is None or not self._is_alike(match[1], self._names.prefix):
            return None
        found = self._names.layers.get((match[2], rename_tail(match[3])))
        if found is None:
            raise self._config.reject(
                f"{name.removesuffix('.weight')} is no module of the language tower of"
                f" {self._base.source.given}"
            )
        return found

    def _beside(self, name: str) -> str | None:
        """An embedding, a norm or a head: equal at the end, and under the tower's prefix."""
        assert self._names is not None
        prefix, *end = name.rsplit(".", 2)
        prefix, end = ("", [prefix, *end]) if len(end) == 1 else (prefix, end)
        for stored in self._names.others:
            parts = strip_wrappers(stored).rsplit(".", 2)
            is_head = end[0] in HEADS
            theirs = parts[0] if len(parts) == 3 else ""
            if parts[-2:] == end and self._is_alike(prefix, theirs, is_head=is_head):
                return stored
        return None

    def _is_alike(self, ours: str, theirs: str, *, is_head: bool = False) -> bool:
        """Whether two prefixes name one tower. The head's may move in and out of an MLLM's."""
        one, other = set(ours.split(".")), set(theirs.split("."))
        if not (is_head and self._is_mllm) and not other - one <= _PLAIN:
            return False
        different = (one ^ other) - _PLAIN
        return not different or (self._is_mllm and all(map(_OF_TEXT.fullmatch, different)))

    def _add_factors(self, module: str, name: str, factors: Factors) -> None:
        self._require_untied(name, "target_modules")
        if len(factors.a.shape) != 2 or len(factors.b.shape) != 2:
            raise self._config.reject(
                f"{module} is no linear layer: A is {factors.a.shape}, B is {factors.b.shape}"
            )
        is_transposed = self._is_transposed(name, factors)
        shape = self._base.tensors[name].shape
        expected = factors.shape[::-1] if is_transposed else factors.shape
        if shape != expected:
            raise self._config.reject(
                f"{name} of {self._base.source.given} is {shape}, but for {module} B is"
                f" {factors.b.shape} and A is {factors.a.shape}; expected {expected}"
            )
        if name in self.adapters:
            raise self._config.reject(f"it adapts {name} twice, once as {module}")
        if is_transposed and factors.magnitude is not None:
            raise self._config.refuse("use_dora", f"{name} is stored transposed")
        magnitude = factors.magnitude.name if factors.magnitude else ""
        self.adapters[name] = StoredAdapter(
            factors.a.name, factors.b.name, factors.scale, magnitude, is_transposed
        )

    def _is_transposed(self, name: str, factors: Factors) -> bool:
        """Whether a weight is (inputs, outputs). PEFT asks the module's class, as here."""
        family = text_config(self._base.config).get("model_type")
        if name.split(".")[-2] in _CONV1D.get(str(family), ()):
            return True
        shape = self._base.tensors[name].shape
        if not self._config.fields.get("fan_in_fan_out") or shape != factors.shape[::-1]:
            return False
        if shape[0] != shape[1]:
            return True
        raise self._config.refuse(
            "fan_in_fan_out", f"{name} is square, so that its shape does not say if it is meant"
        )

    def _add_whole(self, name: str, info: TensorInfo) -> None:
        self._require_untied(name, "modules_to_save")
        shape = self._base.tensors[name].shape
        if info.shape != shape:
            raise self._config.refuse(
                "modules_to_save",
                f"{info.name} is {info.shape}, but {name} of {self._base.source.given} is {shape}",
            )
        self.replaced[info.name] = name

    def _require_untied(self, name: str, field: str) -> None:
        """Embedding and head of one parameter: PEFT changes both, or unties them."""
        if self._tower is None or self._names is None:
            return
        canonical = self._tower.canonical[name]
        is_one = is_tied(self._base.config) or "lm_head.weight" not in self._names.others.values()
        if canonical in ("embed_tokens.weight", "lm_head.weight") and is_one:
            effect = f"{name} is head and embedding of the base at once (tied)"
            raise self._config.refuse(field, effect)

    def _require_all(self, found: Mapping[str, Factors]) -> None:
        """Every module that the fields choose has factors, where the names say which it is."""
        if self._names is None or len(self._prefixes) != 1 or not self._config.targets:
            return
        (prefix,) = self._prefixes
        kinds = {match[2] for m in found if (match := re.fullmatch(r"(.*?\.\d+)\.(.+)", m))}
        missing = []
        for stored in self._names.layers.values():
            match = _NUMBERED.fullmatch(strip_wrappers(stored))
            if match is None or not match[3].endswith(".weight") or ".experts." in stored:
                continue  # experts are fused in memory, and no modules there
            kind = match[3].removesuffix(".weight")
            module = f"{prefix}.{match[2]}.{kind}"
            is_sure = kind in kinds or isinstance(self._config.targets, tuple)
            is_matrix = len(self._base.tensors[stored].shape) == 2
            if is_sure and is_matrix and module not in found and is_adapted(self._config, module):
                missing.append(module)
        if missing:
            raise damaged(
                self._config.label,
                f"{len(missing):,} modules that target_modules chooses have no factors:"
                f" {_examples(missing)}",
                remedy="Some of its weights are missing: download or save it again.",
            )


def _tower_of(base: Checkpoint) -> Tower | None:
    shapes = {name: info.shape for name, info in base.tensors.items()}
    try:
        return canonical_names(Model(base.source.given, shapes, base.config), side="reasoner")
    except AlignmentError:
        return None  # a map may name it later; until then names must be equal


def _names_of(tower: Tower | None) -> _Names | None:
    if tower is None:
        return None
    prefix, layers, others = "", {}, {}
    for stored, canonical in tower.canonical.items():
        match = _NUMBERED.fullmatch(strip_wrappers(stored))
        if match is None or not canonical.startswith("layers."):
            others[stored] = canonical
            continue
        prefix = match[1]
        layers[match[2], rename_tail(match[3])] = stored
    return _Names(prefix, layers, others)


def _shards_of(base: Checkpoint) -> list[ShardHeader]:
    """The shards of the base, named from the root."""
    here = {name: header for name, header in base.shards.items() if name not in base.remote}
    if base.path is None:  # only headers were fetched: no shard will be opened
        return [_renamed(f"{base.source.given}/{name}", h) for name, h in here.items()]
    shards = [_absolute(base.file(name), header) for name, header in here.items()]
    # A shard that is on the Hub has no path yet; the place where it will be names it as well.
    return [*shards, *(_renamed(r.place, base.shards[name]) for name, r in base.remote.items())]


def _absolute(path: Path, header: ShardHeader) -> ShardHeader:
    """A header whose shard is named from the root, since two directories are joined."""
    return _renamed(os.path.realpath(path).lstrip("/"), header)


def _renamed(shard: str, header: ShardHeader) -> ShardHeader:
    tensors = {name: info._replace(shard=shard) for name, info in header.tensors.items()}
    return replace(header, shard=shard, tensors=tensors)


def _without(header: ShardHeader, replaced: Mapping[str, str]) -> ShardHeader:
    """A shard of the base without the tensors that the adapter stores whole."""
    gone = set(replaced.values())
    return replace(header, tensors={n: i for n, i in header.tensors.items() if n not in gone})


def _as_base(header: ShardHeader, replaced: Mapping[str, str]) -> ShardHeader:
    """The adapter's shard with the base's names for the tensors that it stores whole."""
    tensors = {
        replaced.get(name, name): info._replace(name=replaced.get(name, name))
        for name, info in header.tensors.items()
    }
    return replace(header, tensors=tensors)


def _examples(names: Sequence[str] | Iterable[str], count: int = 3) -> str:
    listed = list(names)
    more = f" and {len(listed) - count:,} more" if len(listed) > count else ""
    return ", ".join(listed[:count]) + more
