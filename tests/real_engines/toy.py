"""A toy MLLM whose tensors divide badly, its prior on disk, and the update written by hand.

Rows are odd (9) or single (k and v), so that shards are uneven and some ranks hold nothing
of a tensor; every weight is representable in bfloat16.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn import functional

from tests import checkpoints as c
from tests.runs import as_tensor, run_prior

HIDDEN, INTERMEDIATE, VOCABULARY, LAYERS, TOKENS = 9, 14, 11, 2, 5
ROWS, ACCUMULATION, STEPS = 2, 2, 3  # sequences of a micro-batch; micro-batches of a step; steps
LEARNING_RATE, MOMENTUM = 0.05, 0.9
ALPHA = 0.7
CHANGED = "model.language_model.layers.1.mlp.up_proj.weight"  # by some runs
RULES = ("absolute", "absolute_param_norm", "gradnorm", "adaptive_cosine", "sign", "anchor")

Weights = dict[str, Tensor]


class Sizes(NamedTuple):
    """What may be larger where memory is measured."""

    hidden: int = HIDDEN
    intermediate: int = INTERMEDIATE


class Attention(nn.Module):
    """Nine heads of one element each; k and v have a single head, a single row."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.q_proj = nn.Linear(sizes.hidden, sizes.hidden)
        self.k_proj = nn.Linear(sizes.hidden, 1)
        self.v_proj = nn.Linear(sizes.hidden, 1)
        self.o_proj = nn.Linear(sizes.hidden, sizes.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)  # (B, T, 9), (B, T, 1) twice
        # Not a softmax: it does not see the bias of k, whose gradient would be rounding alone.
        weights = (q.transpose(1, 2)[..., None] * k.transpose(1, 2)[:, :, None]).sigmoid() / TOKENS
        return self.o_proj((weights @ v[:, None]).squeeze(-1).transpose(1, 2))


class Mlp(nn.Module):
    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(sizes.hidden, sizes.intermediate, bias=False)
        self.up_proj = nn.Linear(sizes.hidden, sizes.intermediate, bias=False)
        self.down_proj = nn.Linear(sizes.intermediate, sizes.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.input_layernorm = nn.LayerNorm(sizes.hidden, bias=False)
        self.self_attn = Attention(sizes)
        self.post_attention_layernorm = nn.LayerNorm(sizes.hidden, bias=False)
        self.mlp = Mlp(sizes)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x))
        return x + self.mlp(self.post_attention_layernorm(x))


class Tower(nn.Module):
    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(VOCABULARY, sizes.hidden)
        self.layers = nn.ModuleList(Layer(sizes) for _ in range(LAYERS))
        self.norm = nn.LayerNorm(sizes.hidden, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed_tokens(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)


class Inner(nn.Module):
    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.visual = nn.Linear(sizes.hidden, sizes.hidden)
        self.language_model = Tower(sizes)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.language_model(tokens)
        return hidden + self.visual(hidden)


class Toy(nn.Module):
    """Names in memory as transformers gives them: model.language_model.layers..., lm_head."""

    def __init__(self, sizes: Sizes = Sizes()) -> None:  # noqa: B008  (it is never changed)
        super().__init__()
        self.model = Inner(sizes)
        self.lm_head = nn.Linear(sizes.hidden, VOCABULARY, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """The mean loss of predicting the next token: a number."""
        logits = self.lm_head(self.model(tokens)).flatten(0, 1)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        return functional.cross_entropy(logits, tokens.roll(-1, 1).flatten())


def make_prior(directory: Path, sizes: Sizes = Sizes()) -> Path:  # noqa: B008
    """Write reasoner, mllm and their prior; return the directory."""
    shapes = {name: tuple(p.shape) for name, p in Toy(sizes).named_parameters()}
    text = {_on_disk(n): s for n, s in shapes.items() if "visual" not in n}
    tensors = {}
    for seed, side in ((1, "reasoner"), (2, "mllm")):
        chosen = text if side == "reasoner" else {_on_disk(n): s for n, s in shapes.items()}
        tensors[side] = {
            name: c.store(_values(name, shape, seed)) for name, shape in chosen.items()
        }
    config = {
        "hidden_size": sizes.hidden,
        "intermediate_size": sizes.intermediate,
        "num_attention_heads": sizes.hidden,
        "num_key_value_heads": 1,
        "vocab_size": VOCABULARY,
    }
    c.write_checkpoint(directory / "reasoner", tensors["reasoner"], c.text_config(LAYERS, **config))
    c.write_checkpoint(directory / "mllm", tensors["mllm"], c.mllm_config(LAYERS, **config))
    run_prior(
        directory / "reasoner", directory / "mllm", directory / "prior", modules="attn,mlp,norm"
    )
    torch.save({name: as_tensor(t) for name, t in tensors["mllm"].items()}, directory / "mllm.pt")
    return directory


def load(directory: Path, dtype: torch.dtype = torch.float32) -> Toy:
    """The mllm in a dtype; its vision tower is frozen."""
    stored = torch.load(directory / "mllm.pt", weights_only=True)
    rows, cols = stored["model.layers.0.mlp.up_proj.weight"].shape
    toy = Toy(Sizes(cols, rows)).to(dtype)
    with torch.no_grad():
        for name, parameter in toy.named_parameters():
            parameter.copy_(stored[_on_disk(name)])
    toy.model.visual.requires_grad_(False)  # as the published recipe has it
    return toy


def batches(step: int, world: int) -> Tensor:
    """Tokens of one step for all ranks: (world, ACCUMULATION, ROWS, TOKENS)."""
    generator = torch.Generator().manual_seed(100 + step)
    shape = (world, ACCUMULATION, ROWS, TOKENS)
    return torch.randint(VOCABULARY, shape, generator=generator)


def deltas(directory: Path) -> Weights:
    """The stored deltas by parameter name, in float64."""
    found = {}
    for file in sorted((directory / "prior").glob("*.safetensors")):
        with safe_open(file, "pt") as shard:
            found |= {name: shard.get_tensor(name).double() for name in shard.keys()}  # noqa: SIM118
    for name in [name.removesuffix(":u") for name in found if name.endswith(":u")]:
        found[name] = found.pop(f"{name}:u") @ found.pop(f"{name}:v").T
    names = {name.split("language_model.")[-1]: name for name, _ in Toy().named_parameters()}
    return {names[name]: delta for name, delta in found.items()}


def coefficient(rule: str, gradient: Tensor, delta: Tensor, mllm: Tensor) -> Tensor:
    """What delta is multiplied with for alpha = 1, from the definitions of the paper."""
    g, d = gradient.norm(), delta.norm()
    if not d:  # sign, where the gradient opposes no entry: there is nothing to add
        return torch.zeros_like(g)
    if rule in ("absolute", "anchor"):
        return torch.ones_like(g)
    if rule == "absolute_param_norm":
        return mllm.norm() / d
    if rule in ("gradnorm", "sign"):
        return g / d
    assert rule == "adaptive_cosine"
    cosine = (gradient * delta).sum() / (g * d)
    return (1 + cosine) / 2 * g / d


def used(rule: str, gradient: Tensor, delta: Tensor, moved: Tensor) -> Tensor:
    """What a rule takes of delta where the weights have moved by `moved`."""
    if rule == "sign":
        return torch.where(gradient * delta < 0, delta, 0.0)
    return delta - moved if rule == "anchor" else delta


def train_by_hand(
    directory: Path,
    rule: str | None,
    world: int,
    *,
    dtype: torch.dtype = torch.float64,
    modules: tuple[str, ...] = ("self_attn", "mlp"),
    alpha: float = ALPHA,
    steps: int = STEPS,
    clip: float = 0.0,
    is_clipped_first: bool = False,
) -> Weights:
    """SGD with momentum on float64 weights in one process; rule None: without a bias.

    With float64 the gradient is that of the full batch; with another dtype it is the mean of the
    gradients of the micro-batches, each computed in that dtype, as engines do. `clip` bounds the
    norm of all gradients together, after the bias or before it.
    """
    toy = load(directory, dtype)
    bias = deltas(directory) if rule else {}
    bias = {n: d for n, d in bias.items() if any(f".{m}." in n for m in modules)}
    origin = {name: p.detach().double().clone() for name, p in toy.named_parameters()}
    weights = {name: w.clone() for name, w in origin.items()}
    speed = {name: torch.zeros_like(w) for name, w in origin.items()}
    for step in range(steps):
        tokens = batches(step, world).flatten(0, 1)
        gradients = _gradients(
            toy, tokens.flatten(0, 1)[None] if dtype == torch.float64 else tokens
        )
        if is_clipped_first:
            gradients = _clipped(gradients, clip)
        for name, delta in bias.items():
            taken = used(rule, gradients[name], delta, weights[name] - origin[name])
            found = coefficient(rule, gradients[name], taken, origin[name])
            gradients[name] = gradients[name] - alpha * found * taken
        if not is_clipped_first:
            gradients = _clipped(gradients, clip)
        for name, gradient in gradients.items():
            speed[name] = MOMENTUM * speed[name] + gradient
            weights[name] -= LEARNING_RATE * speed[name]
        with torch.no_grad():
            for name, parameter in toy.named_parameters():
                parameter.copy_(weights[name])
    return weights


def _clipped(gradients: Weights, largest: float) -> Weights:
    norm = torch.stack([gradient.norm() for gradient in gradients.values()]).norm()
    factor = min(1.0, largest / float(norm)) if largest else 1.0
    return {name: gradient * factor for name, gradient in gradients.items()}


def _gradients(toy: Toy, micro_batches: Tensor) -> Weights:
    """The mean over micro-batches, in float64."""
    sums: Weights = {}
    for tokens in micro_batches:
        toy.zero_grad()
        toy(tokens).backward()
        for name, parameter in toy.named_parameters():
            if parameter.requires_grad:
                sums[name] = sums.get(name, 0) + parameter.grad.double() / len(micro_batches)
    return sums


def largest_error(directory: Path, found: Mapping[str, Tensor], expected: Weights) -> float:
    """The largest of |found - expected| / |expected - start| over the tensors, in the 2-norm.

    A number that is not finite on either side is an error of inf.
    """
    start = {n: p.detach() for n, p in load(directory, torch.float64).named_parameters()}
    errors = [0.0]
    for name, values in found.items():
        moved = (expected[name] - start[name]).norm()
        difference = (values.double() - expected[name]).norm()
        error = float(difference / moved) if moved or difference else 0.0
        errors.append(error if math.isfinite(error) else math.inf)  # max() passes over a NaN
    assert found.keys() == expected.keys()
    return max(errors)


def _on_disk(name: str) -> str:
    return name.replace("model.language_model.", "model.").replace("model.visual", "visual")


def _values(name: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    key = int.from_bytes(name.encode()[-24:], "little") % 2**63
    if "norm" in name:
        return np.ones(shape) + np.random.default_rng([seed, key]).normal(0, 0.05, shape)
    ancestor = np.random.default_rng(key).normal(0, 0.4, shape)
    return ancestor + np.random.default_rng([seed, key]).normal(0, 0.1, shape)
