"""The account of a matching: what was found so far, and what is refused about it.

Nothing is left out without a number and a name.
"""

import re
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from difflib import SequenceMatcher

from torch import Tensor

from drift_merge.errors import AlignmentError
from drift_merge.names.layouts import strip_wrappers
from drift_merge.names.modules import ModuleSelection, classify, layer_of
from drift_merge.names.pairing import TowerSide
from drift_merge.training.match.coverage import Coverage, some
from drift_merge.training.match.lines import Hints, Line, Place
from drift_merge.training.match.live import LiveModel
from drift_merge.training.match.samples import looks_like
from drift_merge.training.units import Unit

_FEW = 3  # tensors shown in a message


@dataclass(frozen=True, slots=True)
class Asked:
    """What the user asked for, for messages."""

    label: str  # of the prior
    modules: str
    command: str  # how to compute a prior of these modules


@dataclass(slots=True)
class Account:
    """What became of each selected tensor."""

    asked: Asked
    ours: TowerSide  # the prior
    live: LiveModel
    hints: Hints
    units: list[Unit] = field(default_factory=list)
    frozen: list[str] = field(default_factory=list)  # names in memory
    buffers: list[str] = field(default_factory=list)  # names in memory
    tied: list[str] = field(default_factory=list)
    quantized: list[str] = field(default_factory=list)  # names in memory
    mismatched: list[Line] = field(default_factory=list)  # other shape, or not in the model
    lacking: list[Place] = field(default_factory=list)  # in the model, not in the prior
    inserted: list[str] = field(default_factory=list)  # modules of the mllm alone; names in memory
    num_matched: int = 0  # tensors of the prior
    _seen: set[int] = field(default_factory=set)  # parameters

    def add(self, unit: Unit) -> None:
        """Put in what will be biased."""
        self.units.append(unit)

    def has(self, parameter: Tensor | None) -> bool:
        """Whether a parameter was seen before, under another name; from now on it was."""
        if parameter is None:
            return False
        is_known = id(parameter) in self._seen
        self._seen.add(id(parameter))
        return is_known

    def coverage(self, by_value: tuple[str, ...]) -> Coverage:
        """The same as plain data."""
        return Coverage(
            selected=self.num_matched + len(self.mismatched) + len(self.lacking),
            matched=self.num_matched,
            units=len(self.units),
            elements=sum(unit.numel for unit in self.units),
            frozen=tuple(self.frozen),
            buffers=tuple(self.buffers),
            tied=tuple(self.tied),
            inserted=tuple(self.inserted),
            by_value=by_value,
            unmatched=(*map(_name, self.mismatched), *(place.name for place in self.lacking)),
        )

    def leave_insertions(self, computed: ModuleSelection) -> None:
        """Leave alone what the mllm adds to its layers and the reasoner lacks, module by module.

        The prior was asked for it and does not hold it, but holds its neighbors of the same kind.
        A module of which it holds a part is no insertion, and nothing is while it holds tensors
        that are not found.
        """
        if self.mismatched:
            return
        modules = {parent for name in self.ours.stored for parent in _parents(name)}
        kinds = {(layer_of(name), classify(name)) for name in self.ours.stored}
        for place in list(self.lacking):
            kind = layer_of(place.name), classify(place.name)
            is_alone = place.name.rpartition(".")[0] not in modules
            if computed.takes(place.name) and is_alone and kind in kinds and kind[0] is not None:
                self.lacking.remove(place)
                self.inserted.append(place.stored)

    def require_plain(self) -> None:
        """Refuse packed weights.

        Raises:
            AlignmentError: naming the first.
        """
        if self.quantized:
            raise AlignmentError(
                f"{len(self.quantized):,} selected parameters are quantized, e.g."
                f" {self.quantized[0]}: a delta cannot be added to packed values.",
                remedy="Train LoRA adapters (PEFT) on the quantized model, or load it unquantized.",
            )

    def require_partners(self, *, is_strict: bool) -> None:
        """Refuse tensors without a partner; warn of them if not strict, unless there is none.

        Raises:
            AlignmentError: with the nearest names of both sides.
        """
        missing = len(self.mismatched) + len(self.lacking)
        if not missing and self.num_matched:
            return
        total = missing + self.num_matched
        asked, held = self.asked, _held(self.ours.stored)
        if total == 0:
            raise AlignmentError(
                f"modules {asked.modules!r} and layers select no tensor of {asked.label} or of the"
                " model.",
                remedy=f"The prior holds {held}.",
            )
        message = f"{missing:,} of {total:,} selected tensors have no partner of the same shape."
        if self.mismatched:
            message += f"\n  not in the model, or of another shape there:{self._nearest()}"
        if self.lacking:
            names = [f"{place.name} (in memory {place.stored})" for place in self.lacking]
            message += f"\n  not in {asked.label}, which holds {held}: {some(names)}"
        if is_strict or self.num_matched == 0:
            raise AlignmentError(message, remedy=self._remedy())
        warnings.warn(f"{message} They train without a bias.", stacklevel=5)

    def require_trainable(self, coverage: Coverage) -> None:
        """Refuse a model of which nothing will be biased.

        Raises:
            AlignmentError: everything is frozen or a buffer.
        """
        if coverage.units == 0:
            names = [*coverage.frozen, *coverage.buffers]
            why = "frozen (requires_grad is False)" if coverage.frozen else "buffers"
            raise AlignmentError(
                f"All {len(names):,} matched parameters are {why}, e.g. {some(names)}: there is"
                " nothing to bias.",
                remedy="Unfreeze the language tower, or select modules that are trained.",
            )

    def _nearest(self) -> str:
        """A line for each of the first tensors without a partner: disk and memory, with shapes."""
        found = []
        for line in self.mismatched[:_FEW]:
            name = _name(line)
            disk = self.hints.entries.get(name, {}).get("mllm", "unknown")
            text = f"\n    {name} {_shape(self.ours.shapes.get(name))}, on the disk {disk}"
            near = line.places[0] if line.places else _closest(name, self.lacking)
            if near is not None:
                shape = _shape(self.live.shapes[near.stored])
                text += f"; nearest in memory {near.stored} {shape}"
            found.append(text)
        more = len(self.mismatched) - _FEW
        return "".join(found) + (f"\n    ... {more:,} more" if more > 0 else "")

    def _remedy(self) -> str:
        asked = self.asked
        if any(classify(_name(line)) in ("embed", "head") for line in self.mismatched):
            return (
                "The vocabulary of the model was resized or is another one: leave embed and head"
                " out, e.g. modules='attn,mlp'."
            )
        if self.lacking and not self.mismatched:
            return f"Select less, or compute a prior with them: {asked.command}"
        rules = self._rules()
        if rules:
            return (
                "If these are the same tensors, say so in a file, map.yaml:\nmllm:\n"
                + "\n".join(rules)
                + '\nand pass attach(..., map_file="map.yaml"). Or pass strict=False to train them'
                " without a bias."
            )
        return (
            "Give the model that the prior was computed for, or pass strict=False to train these"
            " tensors without a bias."
        )

    def _rules(self) -> list[str]:
        """Patterns of a map that would pair all of them; none if shapes or values speak against."""
        free, rules = list(self.lacking), {}
        for line in self.mismatched:
            name = _name(line)
            shape = self.ours.shapes.get(name)
            same = [p for p in free if self.live.shapes[p.stored] == shape]
            near = _closest(name, same)
            if near is None or line.places:
                return []
            entry, tensor = self.hints.entries.get(name), self.live.tensor(near.stored)
            if entry is not None and looks_like(tensor, entry) is False:
                return []
            free.remove(near)
            rules[_pattern(strip_wrappers(near.stored), name)] = _pattern(name, name)
        return [f'  "{left}": "{right}"' for left, right in rules.items()]


def _parents(name: str) -> Iterator[str]:
    """The modules that a tensor is in."""
    while "." in name:
        name = name.rpartition(".")[0]
        yield name


def _name(line: Line) -> str:
    return (line.prior or line.names)[0]


def _shape(shape: Iterable[int] | None) -> str:
    return "of unknown shape" if shape is None else f"({', '.join(map(str, shape))})"


def _closest(name: str, places: list[Place]) -> Place | None:
    """The place of the same layer whose name is most alike."""
    same = [place for place in places if layer_of(place.name) == layer_of(name)]
    return max(same, key=lambda p: SequenceMatcher(None, p.name, name).ratio(), default=None)


def _pattern(text: str, name: str) -> str:
    """A name with `{layer}` for its layer number."""
    number = layer_of(name)
    return text if number is None else re.sub(rf"\.{number}\.", ".{layer}.", text, count=1)


def _held(tensors: Iterable[str]) -> str:
    counts = Counter(map(classify, tensors))
    return ", ".join(f"{module} ({count:,})" for module, count in sorted(counts.items()))
