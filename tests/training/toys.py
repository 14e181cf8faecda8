"""A small MLLM in plain PyTorch with the names of transformers, a reasoner, and its prior.

No transformers: a test of a name or of a formula needs none. Every tensor has values of its
own, so that two that are mixed up are found out.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from drift_merge.priors.manifest import Prior
from drift_merge.training.units import Region, Unit, blocks_of
from tests import checkpoints as c
from tests.runs import as_tensor, run_prior
from tests.training.naive import biased, tolerance

RATE = 0.1  # of `sgd`
MEMORY = "model.language_model."  # where transformers 5 keeps the tower; on disk it is "model."


class Toy(NamedTuple):
    """Two checkpoints, the prior of the pair, and what is in them."""

    pair: c.Pair
    prior: Prior

    def deltas(self) -> dict[str, Tensor]:
        """Every stored delta by canonical name."""
        return {name: as_tensor(t) for name, t in c.read_tensors(self.prior.path).items()}

    def model(self, dtype: torch.dtype = torch.float32) -> "Mllm":
        """The mllm in memory."""
        model = Mllm()
        model.load_state_dict(memory_tensors(self.pair.mllm))
        return model.to(dtype)


def distinct(shapes: c.Shapes, seed: int, *, dtype: str = "F32") -> c.Tensors:
    """Random values, other ones for every name."""
    tensors = {}
    for number, (name, shape) in enumerate(sorted(shapes.items())):
        values = np.random.default_rng([seed, number]).normal(0, 0.05, shape)
        tensors[name] = c.store(values, dtype)
    return tensors


def make_toy(
    directory: Path, *, stored: str = "F32", seed: int = 0, layers: int = 2, **recipe: Any
) -> Toy:
    """Write a pair and compute its prior.

    Args:
        directory: where.
        stored: dtype code of both checkpoints.
        seed: another one gives other checkpoints.
        layers: of the tower.
        recipe: for the prior; all modules but embed and head, in float32, unless said otherwise.
    """
    text = distinct(c.text_shapes(layers), 2 * seed + 1, dtype=stored)
    whole = distinct(c.text_shapes(layers) | c.vision_shapes(), 2 * seed + 2, dtype=stored)
    files = {"tokenizer.json": c.tokenizer()}
    c.write_checkpoint(directory / "reasoner", text, c.text_config(layers), sidecars=files)
    c.write_checkpoint(directory / "mllm", whole, c.mllm_config(layers), sidecars=files)
    pair = c.Pair(directory / "reasoner", directory / "mllm")
    options = {"dtype": "float32", "modules": "attn,mlp,norm"} | recipe
    return Toy(pair, run_prior(*pair, directory / "prior", **options).prior)


def memory_tensors(directory: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint by their names in memory."""
    return {memory_name(name): as_tensor(t) for name, t in c.read_tensors(directory).items()}


def memory_name(name: str) -> str:
    """model.layers.0... -> model.language_model.layers.0..., visual... -> model.visual..."""
    if name.startswith("visual."):
        return f"model.{name}"
    return name.replace("model.", MEMORY, 1) if name.startswith("model.") else name


class Holder(nn.Module):
    """A module for its names alone."""


def holder(tensors: Mapping[str, Tensor | nn.Parameter]) -> Holder:
    """A module whose parameters have these names."""
    root = Holder()
    for name, values in tensors.items():
        *path, leaf = name.split(".")
        module: nn.Module = root
        for part in path:
            if part not in module._modules:
                module.add_module(part, Holder())
            module = module._modules[part] or module
        parameter = values if isinstance(values, nn.Parameter) else nn.Parameter(values)
        module.register_parameter(leaf, parameter)
    return root


def fuse(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same model with fused qkv and gate_up, as Phi-3 has them."""
    fused = dict(tensors)
    for layer in range(2):
        at = f"model.language_model.layers.{layer}."
        for leaf in ("weight", "bias"):
            parts = [fused.pop(f"{at}self_attn.{x}_proj.{leaf}") for x in "qkv"]
            fused[f"{at}self_attn.qkv_proj.{leaf}"] = torch.cat(parts)
        parts = [fused.pop(f"{at}mlp.{x}_proj.weight") for x in ("gate", "up")]
        fused[f"{at}mlp.gate_up_proj.weight"] = torch.cat(parts)
    return fused


class Attention(nn.Module):
    """Not attention, but every weight of it takes part."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(c.HIDDEN, c.HIDDEN)
        self.k_proj = nn.Linear(c.HIDDEN, c.KV)
        self.v_proj = nn.Linear(c.HIDDEN, c.KV)
        self.o_proj = nn.Linear(c.HIDDEN, c.HIDDEN, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        keys, values = self.k_proj(x).repeat(1, 2), self.v_proj(x).repeat(1, 2)
        return self.o_proj(torch.tanh(self.q_proj(x)) * keys + values)


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(c.HIDDEN, c.INTERMEDIATE, bias=False)
        self.up_proj = nn.Linear(c.HIDDEN, c.INTERMEDIATE, bias=False)
        self.down_proj = nn.Linear(c.INTERMEDIATE, c.HIDDEN, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(torch.nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(c.HIDDEN, eps=1e-5)
        self.post_attention_layernorm = nn.RMSNorm(c.HIDDEN, eps=1e-5)
        self.self_attn, self.mlp = Attention(), Mlp()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x))
        return x + self.mlp(self.post_attention_layernorm(x))


class Tower(nn.Module):
    def __init__(self, layers: int) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(c.VOCABULARY, c.HIDDEN)
        self.layers = nn.ModuleList(Layer() for _ in range(layers))
        self.norm = nn.RMSNorm(c.HIDDEN, eps=1e-5)
        self.checkpointing: Any = None  # called as checkpointing(layer, x)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed_tokens(tokens)
        for layer in self.layers:
            x = self.checkpointing(layer, x) if self.checkpointing else layer(x)
        return self.norm(x)


class Mllm(nn.Module):
    """The names of Qwen2.5-VL in transformers 5; the vision tower is there but not used."""

    def __init__(self, layers: int = 2) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.language_model = Tower(layers)
        vision = {n: torch.zeros(s) for n, s in c.vision_shapes().items()}
        self.model.visual = holder({n.removeprefix("visual."): v for n, v in vision.items()})
        self.lm_head = nn.Linear(c.HIDDEN, c.VOCABULARY, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.lm_head(self.model.language_model(tokens))


def loss_of(model: nn.Module, seed: int = 0, batch: int = 6) -> Tensor:
    """A loss of random tokens; the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, c.VOCABULARY, (batch, 2), generator=generator)
    logits = model(tokens[:, 0])
    return torch.nn.functional.cross_entropy(logits.float(), tokens[:, 1])


def selected(model: nn.Module, modules: tuple[str, ...] = ("self_attn", "mlp")) -> dict[str, Any]:
    """Canonical name -> parameter, for attn and mlp, wrappers stripped by hand."""
    found = {}
    for name, parameter in model.named_parameters():
        if "language_model.layers." in name and any(f".{m}." in name for m in modules):
            found["layers." + name.split("language_model.layers.")[1]] = parameter
    return found


def read_region(source: Any, unit: Unit, region: Region, elements: int = 64) -> Tensor:
    """A whole region of a source of deltas, flat, read in chunks."""
    found, begin = [torch.empty(0)], 0
    for block in blocks_of(unit, region, elements):
        out = torch.empty(block.numel)
        source.chunk(unit, begin, block, out)
        found.append(out)
        begin += block.numel
    return torch.cat(found)


def sgd(parameters: Any, lr: float = RATE) -> torch.optim.SGD:
    return torch.optim.SGD(parameters, lr=lr)


def step(model: nn.Module, *optimizers: Any, seed: int = 0) -> None:
    for optimizer in optimizers:
        optimizer.zero_grad()
    loss_of(model, seed).backward()
    for optimizer in optimizers:
        optimizer.step()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Copies of those of what is selected."""
    return {name: p.grad.clone() for name, p in selected(model).items()}


def expected(
    toy: Toy, before: Mapping[str, Tensor], rule: str, alpha: float | Mapping[str, float] = 1.0
) -> dict[str, Tensor]:
    """Biased gradients by the naive formula; alpha may be by module."""
    deltas, entries = toy.deltas(), toy.prior.tensors
    return {
        name: biased(
            rule,
            gradient,
            deltas[name],
            alpha=alpha if isinstance(alpha, float) else alpha[entries[name]["module"]],
            mllm_norm=entries[name]["norm_mllm"],
        )
        for name, gradient in before.items()
    }


def require_equal(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """Within the rounding of their dtype."""
    assert found.keys() == wanted.keys()
    for name, gradient in found.items():
        worst = float((gradient.double() - wanted[name]).abs().max())
        assert worst <= tolerance(gradient, wanted[name]), name
