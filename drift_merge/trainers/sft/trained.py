"""Which tensors of an MLLM are trained, from headers alone: its tower, or factors beside it."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from drift_merge.names.lineage import text_config
from drift_merge.names.modules import classify, layer_of
from drift_merge.names.tensors import Model, Shape
from drift_merge.names.towers import canonical_names


@dataclass(frozen=True, slots=True)
class Trained:
    """Numbers of elements."""

    total: int  # of the mllm
    tower: int  # of its language tower: what is trained without LoRA and --train-all
    matrices: tuple[Shape, ...]  # of the tower's layers: those that LoRA adapts
    num_layers: int
    hidden: int
    width: int  # of the mlp, the largest of a layer's matrices
    vocabulary: int

    def factors(self, rank: int) -> int:
        """Elements of LoRA's factors: rank * (rows + columns) for each matrix."""
        return sum(rank * (shape[0] + shape[1]) for shape in self.matrices)


def is_adapted(canonical: str, shape: Shape | None) -> bool:
    """Whether LoRA adapts a tensor: every matrix of attention, mlp and mixer, no router."""
    if layer_of(canonical) is None or shape is None or len(shape) != 2:
        return False
    module = canonical.removesuffix(".weight").rpartition(".")[2]
    is_router = module in ("gate", "router") or ".router." in canonical
    return canonical.endswith(".weight") and not is_router and classify(canonical) != "norm"


def trained_of(label: str, shapes: Mapping[str, Shape], config: Mapping[str, Any]) -> Trained:
    """Count what is trained.

    Raises:
        AlignmentError: there is no language tower.
    """
    tower = canonical_names(Model(label, shapes, config))
    named = {tower.canonical[name]: shapes[name] for name in tower.canonical}
    text = text_config(config)
    matrices = tuple(shape for name, shape in named.items() if is_adapted(name, shape))
    embedding = named.get("embed_tokens.weight", (0, 0))
    return Trained(
        total=sum(prod(shape) for shape in shapes.values()),
        tower=sum(prod(shape) for shape in named.values()),
        matrices=matrices,
        num_layers=tower.num_layers,
        hidden=int(text.get("hidden_size") or embedding[-1]),
        width=max((max(shape) for shape in matrices), default=0),
        vocabulary=embedding[0],
    )
