"""Other names for the tensors of a model, and what was biased of it."""

import torch

TOWER = "model.language_model."


def renamed(tensors, *places):
    found = {}
    for name, tensor in tensors.items():
        for old, new in places:
            name = name.replace(old, new)
        found[name] = tensor
    return found


def biases(handle, model):
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    handle.apply()
    return {n: -p.grad for n, p in model.named_parameters() if p.grad.abs().sum()}


def shapes_of(toy):
    return {name: tuple(entry["shape"]) for name, entry in toy.prior.tensors.items()}


# What names leave over.


OTHER = (
    (".up_proj.", ".zeta."),
    (".gate_proj.", ".omega."),
)  # of one shape: names alone say no more
