"""Training takes a compressed prior: its deltas are those that the codes and scales stand for."""

import numpy as np
import pytest
import torch
from torch import nn

import drift_merge
from drift_merge.priors.manifest import open_prior
from drift_merge.training.deltas.files import FileDeltas
from drift_merge.training.deltas.opened import open_for_training
from drift_merge.training.units import Block, Origin, Unit
from tests import checkpoints as c
from tests.runs import run_prior

DTYPES = ("int8", "float8_e4m3fn")
UP = "layers.0.mlp.up_proj.weight"  # (24, 16)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    directory = tmp_path_factory.mktemp("made")
    pair = c.make_pair(directory, layers=1)
    for dtype in DTYPES:
        run_prior(*pair, directory / dtype, dtype=dtype)
    return directory, pair


def values(directory, name):
    """A stored delta in float32, by numpy alone."""
    tensors = c.read_tensors(directory)
    found = tensors[name].values.astype(np.float32)
    if f"{name}:scale" in tensors:
        found = found * tensors[f"{name}:scale"].values[..., None]
    return torch.tensor(found)


def model_of(tensors):
    """A module tree with these parameters, float32; enough for names and gradients."""
    root = nn.Module()
    for name, stored in tensors.items():
        *path, leaf = name.split(".")
        module = root
        for part in path:
            if not hasattr(module, part):
                module.add_module(part, nn.Module())
            module = getattr(module, part)
        values = torch.tensor(stored.values.astype(np.float32))
        module.register_parameter(leaf, nn.Parameter(values))
    return root


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_step_moves_every_parameter_by_the_decompressed_delta(made, dtype):
    directory, pair = made
    model = model_of(c.read_tensors(pair.mllm))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    prior = directory / dtype
    drift_merge.attach(model, prior, rule="absolute", alpha=2.0, optimizer=optimizer)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    deltas = {f"model.{name}": values(prior, name) for name in open_prior(prior).tensors}
    assert len(deltas) == 10
    for name, parameter in model.named_parameters():
        moved = before[name] + deltas.get(name, torch.zeros(()))  # lr * alpha = 1
        assert torch.equal(parameter.detach(), moved), name


@pytest.mark.parametrize("out", [torch.float32, torch.float64])
@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_part_of_a_unit_stored_either_way_is_decompressed(made, dtype, is_transposed, out):
    directory, _ = made
    source = FileDeltas([open_for_training(directory / dtype)], [0.5])
    unit = Unit(UP, "p", None, "mlp", 0, (5, 7), 0, Origin(3, 2, is_transposed))
    whole = values(directory / dtype, UP)
    inside = whole[3:10, 2:7].T if is_transposed else whole[3:8, 2:9]
    found = torch.empty(2 * 4, dtype=out)
    source.chunk(unit, 0, Block(1, 2, 3, 4), found)
    assert torch.equal(found.view(2, 4), 0.5 * inside[1:3, 3:7].to(out))
