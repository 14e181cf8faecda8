"""A pairing of a prior with a live model, as plain data."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from drift_merge.names.name_map import SideMap
from drift_merge.names.tensors import Part
from drift_merge.storage.measured import TensorRecord


@dataclass(frozen=True, slots=True)
class Place:
    """A tensor in memory and the parts of it that the prior's tensors fill."""

    name: str  # canonical
    stored: str  # in memory
    parts: tuple[Part, ...]  # `name` is that of the prior's tensor


@dataclass(frozen=True, slots=True)
class Line:
    """One line of the account: a tensor, or a group that one side fuses."""

    status: str  # matched | shape_mismatch | only_reasoner (the prior's) | only_mllm (in memory)
    prior: tuple[str, ...]  # canonical names
    places: tuple[Place, ...]
    is_converted: bool = False  # by the model's own conversion: the prior's names are what counts

    @property
    def names(self) -> tuple[str, ...]:
        """The canonical names that modules and layers select."""
        of_places = tuple(place.name for place in self.places)
        return self.prior if self.is_converted or not of_places else of_places


@dataclass(frozen=True, slots=True)
class Hints:
    """What helps to tell names in memory: all of it optional."""

    entries: Mapping[str, TensorRecord] = field(
        default_factory=dict
    )  # the manifest's, by canonical name
    name_map: SideMap = field(default_factory=SideMap)  # the mllm's side of a `--map` file
    tower: str | None = None  # prefix in memory of the tower to train
    by_value: Mapping[str, str] = field(default_factory=dict)  # pairs of the run that goes on
    computed: tuple[str, str | None] | None = (
        None  # modules and layers that the prior was asked for
    )


@dataclass(frozen=True, slots=True)
class Paired:
    """Every tensor of the prior and of the tower in memory, once."""

    lines: tuple[Line, ...]
    num_layers: int
    by_value: Mapping[str, str]  # canonical name -> name in memory, of pairs that values made
