"""LoRA layers after PEFT's form, in float64."""

import torch
from torch import nn

OUT, IN, RANK = 6, 5, 3


class DoraLinearVariant:
    """Known by its name alone, as PEFT's is."""


class ArrowLinearVariant:
    """One that is not s B A."""


class ToyLora(nn.Module):
    """W0 + s B A, and DoRA's m V / |V|, with the attributes of PEFT's layers."""

    def __init__(self, out=OUT, columns=IN, rank=RANK, *, dora=False, experts=1, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.base_layer = nn.Linear(columns, out, bias=False).double().requires_grad_(False)
        self.lora_A, self.lora_B = nn.ModuleDict(), nn.ModuleDict()
        self.lora_magnitude_vector = nn.ModuleDict()
        self.scaling, self.lora_variant = {}, {}
        self.active_adapters, self.disable_adapters = [], False
        self.in_features, self.out_features, self.num_experts = columns, out, experts
        self.add("default", rank, 2.0 / rank, dora=dora)

    def add(self, name, rank, scale, *, dora=False):
        total = rank * self.num_experts
        self.lora_A[name] = nn.Linear(self.in_features, total, bias=False).double()
        self.lora_B[name] = nn.Linear(total, self.out_features, bias=False).double()
        self.scaling[name] = scale
        self.active_adapters.append(name)
        if dora:
            self.lora_variant[name] = DoraLinearVariant()
            magnitude = nn.Module()
            magnitude.weight = nn.Parameter(torch.rand(self.out_features).double() + 0.5)
            self.lora_magnitude_vector[name] = magnitude

    def get_base_layer(self):
        return self.base_layer

    def weight(self):
        """What acts in the forward pass, differentiable in the factors."""
        v = self.base_layer.weight
        for name in self.active_adapters:
            v = v + self.scaling[name] * self.lora_B[name].weight @ self.lora_A[name].weight
            if name in self.lora_variant:
                n = torch.linalg.vector_norm(v, dim=1).detach()
                v = (self.lora_magnitude_vector[name].weight / n)[:, None] * v
        return v
