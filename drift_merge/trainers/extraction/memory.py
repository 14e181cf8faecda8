"""Which linear layer in memory takes which part of a prior, from names and shapes alone.

The MLLM is built on the meta device by the class that loads it, so that the names are those that
PEFT meets: those on the disk are others.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from drift_merge.errors import SourceError
from drift_merge.priors.deltas import Deltas
from drift_merge.priors.manifest import Prior
from drift_merge.training.match.lines import Hints
from drift_merge.training.match.matching import match
from drift_merge.training.units import Block, Unit

_CLASSES = ("AutoModelForImageTextToText", "AutoModelForMultimodalLM", "AutoModelForCausalLM")


@dataclass(frozen=True, slots=True)
class Target:
    """A linear layer in memory and the parts of the prior that its weight takes."""

    module: str  # dotted, as model.named_modules() gives it
    shape: tuple[int, int]  # of the weight: outputs, inputs
    units: tuple[Unit, ...]

    def delta(self, deltas: Deltas) -> Tensor:
        """The delta of the whole weight, float32; rows that the prior does not hold are zero."""
        found = torch.zeros(self.shape)
        cols = self.shape[1]
        for unit in self.units:
            rows = unit.numel // cols
            span = unit.origin.span(Block(0, rows, 0, cols))
            stored = deltas.block(
                unit.name, (span.row, span.row + span.rows), (span.col, span.col + span.cols)
            )
            first = unit.begin // cols
            found[first : first + rows] = unit.origin.pick(stored)
        return found


@dataclass(frozen=True, slots=True)
class Targets:
    """Every tensor of a prior: in a linear layer, or left out with a reason."""

    layers: tuple[Target, ...]
    left_out: Mapping[str, str]  # name in memory -> reason


def build(transformers: Any, source: str, revision: str | None) -> nn.Module:
    """The model of a checkpoint on the meta device, by the first class that knows its config.

    Args:
        transformers: the package.
        source: a directory, a file inside one, or a Hub id.
        revision: of the Hub id.

    Raises:
        SourceError: there is no config, or no class of transformers for it.
    """
    path = Path(source)
    where = str(path.parent if path.is_file() else path)
    try:
        config = transformers.AutoConfig.from_pretrained(
            where,
            trust_remote_code=False,  # unsaid, transformers asks on the terminal
            **({"revision": revision} if revision and not path.exists() else {}),
        )
        for name in _CLASSES:
            auto = getattr(transformers, name, None)
            if auto is not None and type(config) in auto._model_mapping:
                with torch.device("meta"):
                    model: nn.Module = auto.from_config(config, trust_remote_code=False)
                return model
    except (OSError, ValueError, KeyError) as error:
        raise SourceError(
            f"the model class of {source} cannot be found: {str(error).splitlines()[0]}",
            remedy="Say where its config.json is: --mllm DIRECTORY",
        ) from error
    raise SourceError(
        f"transformers has no class that generates text from {type(config).__name__} ({source}).",
        remedy="Merge instead, which needs no class: drift-prior apply PRIOR MLLM -o OUT",
    )


def find_targets(model: nn.Module, prior: Prior, shapes: Mapping[str, Any]) -> Targets:
    """Find the place of every tensor of a prior.

    Args:
        model: on any device.
        prior: opened.
        shapes: canonical name -> shape of every delta.

    Raises:
        AlignmentError: prior and model do not match.
    """
    parameters = prior.manifest["parameters"]
    asked = str(parameters["modules"]), parameters["layers"]
    matching = match(
        model,
        shapes,
        label=str(prior.path),
        modules=asked[0],
        layers=asked[1],
        hints=Hints(entries=prior.tensors, computed=asked),
        needs_values=False,
    )
    by_name: dict[str, list[Unit]] = {}
    for unit in matching.units:
        by_name.setdefault(unit.parameter_name, []).append(unit)
    shared = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    left_out = dict.fromkeys(matching.coverage.buffers, "a buffer")
    layers = []
    for name, units in by_name.items():
        parameter = units[0].parameter
        reason = _reason(model, name, is_tied=shared[id(parameter)] > 1)
        if reason:
            left_out[name] = reason
        else:
            assert parameter is not None
            rows, cols = parameter.shape
            layers.append(Target(name.removesuffix(".weight"), (rows, cols), tuple(units)))
    return Targets(tuple(layers), left_out)


def _reason(model: nn.Module, name: str, *, is_tied: bool) -> str:
    """Why no LoRA can hold a parameter; empty where one can."""
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    if is_tied:
        return "tied to another weight, which an adapter would not change with it"
    if leaf == "bias":
        return "a bias"
    if isinstance(module, nn.Embedding):
        return "an embedding"
    if isinstance(module, nn.Linear) and leaf == "weight":
        return ""
    parameter = model.get_parameter(name)
    if parameter.ndim > 2:
        return "experts or a convolution of more than two dimensions"
    return "a norm or vector" if parameter.ndim < 2 else "not the weight of a linear layer"
