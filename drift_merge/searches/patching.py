"""Merges straight into a model that is loaded: its tower is patched in place, and put back.

No checkpoint is written. A patched parameter holds the very bytes that the checkpoint would,
in the model's dtype. Needs memory for a second copy of what is patched, on the CPU.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from drift_merge.engine.inputs import Inputs
from drift_merge.engine.pieces import read_whole
from drift_merge.engine.strangers import refuse_strangers
from drift_merge.engine.stream import recompute
from drift_merge.errors import AlignmentError
from drift_merge.maths.dtypes import TORCH_DTYPES
from drift_merge.names.tensors import matrix_shape
from drift_merge.plans.plan import Plan
from drift_merge.plans.prepare import Prepared
from drift_merge.recipes.recipe import Recipe
from drift_merge.searches.targets import Sources
from drift_merge.storage.headers import TensorInfo
from drift_merge.training.match.lines import Hints
from drift_merge.training.match.matching import match
from drift_merge.training.units import Block, Unit

Units = Mapping[str, list[Unit]]  # by canonical name


class PatchedModel:
    """A live model that takes the place of each merge in turn."""

    def __init__(self, model: nn.Module, sources: Sources, *, device: str = "cpu") -> None:
        self._model, self._sources, self._device = model, sources, device
        self._units: dict[tuple[str, str | None], Units] = {}

    @contextmanager
    def made(self, recipe: Recipe, label: str) -> Iterator[nn.Module]:
        """Patch the model to be the merge of a recipe; put it back afterwards.

        Raises:
            AlignmentError: the model is not the recipe's mllm.
            CheckpointError, RecipeError: the merge cannot be computed.
        """
        prepared, plan = self._sources.plan(recipe)
        refuse_strangers(plan, prepared.findings)
        units = self._matched(prepared)
        saved: dict[str, Tensor] = {}
        parameters = dict(self._model.named_parameters(remove_duplicate=False))
        try:
            with torch.no_grad():
                steps, sink = plan.parameters, _Patch(plan, units, saved)
                sinks = dict.fromkeys((step.name for step in steps), sink)
                recompute(plan, steps, device=self._device, sinks=sinks)
            yield self._model
        finally:
            with torch.no_grad():
                for name, values in saved.items():
                    parameters[name].copy_(values)

    @contextmanager
    def unmerged(self, recipe: Recipe) -> Iterator[nn.Module]:
        """The model as it is."""
        self._matched(self._sources.prepared(recipe))
        yield self._model

    def _matched(self, prepared: Prepared) -> Units:
        recipe = prepared.recipe
        key = (recipe.modules, recipe.layers)
        if key not in self._units:
            self._units[key] = _match(self._model, prepared)
        return self._units[key]


def _match(model: nn.Module, prepared: Prepared) -> Units:
    recipe, alignment = prepared.recipe, prepared.reasoners[0][1]
    stored = {pair.canonical: prepared.mllm.tensors[pair.mllm] for pair in alignment.pairs}
    frozen = [p for p in model.parameters() if not p.requires_grad and p.is_floating_point()]
    for parameter in frozen:  # what does not train is patched all the same
        parameter.requires_grad_(True)
    try:
        matching = match(
            model,
            {name: info.shape for name, info in stored.items()},
            label="the merge",
            modules=recipe.modules,
            layers=recipe.layers,
            hints=Hints(computed=(recipe.modules, recipe.layers)),
        )
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)
    found: dict[str, list[Unit]] = {}
    for unit in matching.units:
        if unit.parameter is None or unit.is_adapted:
            raise AlignmentError(
                f"{unit.parameter_name} is adapted or quantized: it cannot be patched.",
                remedy="Load the mllm without adapters and unquantized, or let the objective take "
                "a directory.",
            )
        found.setdefault(unit.name, []).append(unit)
    _require_the_mllm(found, stored, prepared)
    return found


def _require_the_mllm(units: Units, stored: Mapping[str, TensorInfo], prepared: Prepared) -> None:
    """Refuse another model than the mllm, by the values of the first tensor that is patched."""
    for name, (unit, *others) in units.items():
        info = stored[name]
        if others or unit.shape != info.shape or unit.origin.is_transposed:
            continue
        with Inputs([prepared.mllm]) as inputs:
            expected = read_whole(inputs.mapped(0), info)[0].flatten()
        assert unit.parameter is not None
        own = unit.parameter.detach().flatten().cpu()
        if torch.equal(own, expected.to(own.dtype)):
            return
        raise AlignmentError(
            f"the model is not {prepared.mllm.source.label}: {unit.parameter_name} has other "
            f"values than {info.name}.",
            remedy="Load it from the recipe's mllm, and do not change it before the search.",
        )


class _Patch:
    """Takes the bytes of each tensor, and puts the tensor into the model when it is whole."""

    def __init__(self, plan: Plan, units: Units, saved: dict[str, Tensor]) -> None:
        self._units, self._saved = units, saved
        self._canonical = {step.name: step.canonical for step in plan.parameters}
        self._buffers: dict[str, Tensor] = {}

    def write(self, info: TensorInfo, begin: int, data: Any) -> None:
        """Take bytes [begin, begin + len(data)) of a tensor."""
        if info.name not in self._buffers:
            self._buffers[info.name] = torch.empty(info.size_bytes, dtype=torch.uint8)
        buffer = self._buffers[info.name]
        piece = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        buffer[begin : begin + len(piece)] = piece
        if begin + len(piece) == info.size_bytes:
            tensor = self._buffers.pop(info.name).view(TORCH_DTYPES[info.dtype])
            self._put(self._canonical[info.name], tensor.view(matrix_shape(info.shape)))

    def _put(self, canonical: str, matrix: Tensor) -> None:
        for unit in self._units[canonical]:
            assert unit.parameter is not None
            if unit.parameter_name not in self._saved:
                self._saved[unit.parameter_name] = unit.parameter.detach().cpu().clone()
            rows, cols = matrix_shape(unit.shape)
            span = unit.origin.span(Block(0, rows, 0, cols))
            block = matrix[span.row : span.row + span.rows, span.col : span.col + span.cols]
            place = unit.parameter.view(-1)[unit.begin : unit.begin + unit.numel]
            place.copy_(unit.origin.pick(block).reshape(-1))
