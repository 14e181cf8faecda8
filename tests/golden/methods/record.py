"""Record what mergekit and PEFT give on small tensors; run once, in an environment of its own.

    python -m venv golden-venv && golden-venv/bin/pip install mergekit==0.1.5 peft==0.21.2
    golden-venv/bin/python tests/golden/methods/record.py

Both packages are called, none of their code is here. Where they draw random masks,
`torch.bernoulli` is replaced by a comparison with recorded chances, one tensor per model, so that
ours can be given the same. Writes mergekit.json and peft.json beside this file.
"""

import importlib.metadata
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

HERE = Path(__file__).parent
SHAPE = (5, 8)
TWO = {"weight": [0.75, 0.5]}  # mllm, reasoner
THREE = {"weight": [0.75, 0.5, -0.25]}
POSITIVE = {"weight": [0.75, 0.5, 0.25]}

# (our method, its options, mergekit's method, its parameters, inputs). Inputs: "base": base, mllm
# and two reasoners; "pair": mllm as mergekit's base, and one reasoner; "free2" and "free3": no
# base, mllm and one or two reasoners; "base2": base, mllm and one reasoner.
Case = tuple[str, dict[str, Any], str, dict[str, Any], str]


def mergekit_cases() -> Iterator[Case]:
    """Every method that both have, with its options."""
    for normalize in (True, False):
        flag = {"normalize": normalize}
        yield "linear", flag, "linear", {**POSITIVE, **flag}, "free3"
        yield "task-arithmetic", flag, "task_arithmetic", {**POSITIVE, **flag}, "base"
        for density in (0.2, 0.53, 1.0):
            both = {"density": density, **flag}
            yield "ties", both, "ties", {**POSITIVE, **both}, "base"
        for density, gamma in ((0.9, 0.05), (0.5, 0.1), (0.97, 0.2), (1.0, 0.1)):
            both = {"density": density, "gamma": gamma, **flag}
            yield "breadcrumbs", both, "breadcrumbs", {**POSITIVE, **both}, "base"
            yield "breadcrumbs-ties", both, "breadcrumbs_ties", {**POSITIVE, **both}, "base"
        for rescale in (True, False):
            both = {"density": 0.4, "rescale": rescale, **flag}
            yield "dare-linear", both, "dare_linear", {**POSITIVE, **both}, "base"
            yield "dare-ties", both, "dare_ties", {**POSITIVE, **both}, "base"
            both = {**both, "epsilon": 0.25}
            yield "della", both, "della", {**POSITIVE, **both}, "base"
            yield "della-linear", both, "della_linear", {**POSITIVE, **both}, "base"
    scaled = {"density": 0.4, "scale": 0.5}
    yield "ties", scaled, "ties", {**THREE, "density": 0.4, "lambda": 0.5}, "base"
    for density in (0.1, 0.5, 1.0):
        yield "sce", {"density": density}, "sce", {"select_topk": density}, "base"
    for filter_wise in (False, True):
        flag = {"filter_wise": filter_wise}
        yield "model-stock", flag, "model_stock", flag, "base"
    yield "nearswap", {"t": 0.1}, "nearswap", {"t": 0.1}, "pair"
    yield "arcee-fusion", {"variant": "paper"}, "arcee_fusion", {}, "pair"
    for t in (0.0, 0.3, 1.0):
        yield "slerp", {"t": t}, "slerp", {"t": t}, "pair"
    yield "nuslerp", {}, "nuslerp", TWO, "free2"
    yield "nuslerp", {}, "nuslerp", TWO, "base2"
    for column_wise in (False, True):
        ours = {"flatten": False, "column_wise": column_wise}
        theirs = {"nuslerp_flatten": False, "nuslerp_row_wise": column_wise}
        yield "nuslerp", ours, "nuslerp", {**TWO, **theirs}, "free2"
        yield "nuslerp", ours, "nuslerp", {**TWO, **theirs}, "base2"
    yield "multislerp", {}, "multislerp", POSITIVE, "free3"
    yield "multislerp", {}, "multislerp", POSITIVE, "base"
    yield "karcher", {"variant": "paper"}, "karcher", {}, "free3"
    yield "karcher", {"variant": "paper"}, "karcher", {}, "free2"


def make_inputs() -> dict[str, Tensor]:
    """Task vectors that share part of their direction, and chances for three random masks."""
    generator = torch.Generator().manual_seed(20)
    shared = torch.randn(SHAPE, generator=generator)
    base = torch.randn(SHAPE, generator=generator)
    found = {"base": base}
    for name in ("mllm", "first", "second"):
        own = torch.randn(SHAPE, generator=generator)
        found[name] = base + 0.2 * shared + 0.2 * own
    for stream in range(3):
        found[f"chances{stream}"] = torch.rand(SHAPE, generator=generator)
    return found


class Bernoulli:
    """In the place of torch.bernoulli: each call takes the next model's chances."""

    def __init__(self, inputs: dict[str, Tensor]) -> None:
        self.chances = [inputs[f"chances{stream}"] for stream in range(3)]

    def __call__(self, odds: Tensor) -> Tensor:
        return (self.chances.pop(0).reshape(odds.shape) < odds).to(odds.dtype)


def record_mergekit(inputs: dict[str, Tensor]) -> list[dict[str, Any]]:
    """Call mergekit's methods as its own graph does."""
    from mergekit.merge_methods import registry
    from mergekit.merge_methods.base import TensorGroup

    names = {
        "base": ("base", "mllm", "first", "second"),
        "base2": ("base", "mllm", "first"),
        "pair": ("mllm", "first"),
        "free2": ("mllm", "first"),
        "free3": ("mllm", "first", "second"),
    }
    cases = []
    for name, options, theirs, parameters, kind in mergekit_cases():
        torch.bernoulli = Bernoulli(inputs)
        base_index = None if kind.startswith("free") else 0
        tensors = [inputs[n].clone() for n in names[kind]]
        group = TensorGroup.from_tensors(tensors, base_index=base_index)
        [result] = registry.get(theirs)([group], parameters=parameters)
        case = {"method": name, "options": options, "inputs": kind, "theirs": [theirs, parameters]}
        cases.append(case | {"result": result.flatten().tolist()})
    return cases


def record_peft(inputs: dict[str, Tensor]) -> list[dict[str, Any]]:
    """Call the functions behind PEFT's add_weighted_adapter on task vectors; add the base."""
    from peft.utils import merge_utils

    weights = torch.tensor([0.75, 0.5, -0.25])
    calls = {"dare-linear": "dare_linear", "dare-ties": "dare_ties", "ties": "ties"}
    cases = []
    for name, theirs in calls.items():
        for density in (0.2, 0.53, 0.9):
            torch.bernoulli = Bernoulli(inputs)
            taus = [inputs[n] - inputs["base"] for n in ("mllm", "first", "second")]
            merged = getattr(merge_utils, theirs)(taus, weights, density)
            case = {"method": name, "options": {"density": density}, "inputs": "base"}
            case |= {"theirs": [theirs, {"weight": weights.tolist()}]}
            cases.append(case | {"result": (inputs["base"] + merged).flatten().tolist()})
    return cases


def main() -> None:
    """Write both files."""
    inputs = make_inputs()
    for package, record in (("mergekit", record_mergekit), ("peft", record_peft)):
        versions = {p: importlib.metadata.version(p) for p in (package, "torch")}
        content = {
            "versions": versions,
            "shape": SHAPE,
            "inputs": {name: tensor.flatten().tolist() for name, tensor in inputs.items()},
            "cases": record(inputs),
        }
        text = json.dumps(content, indent=1)
        (HERE / f"{package}.json").write_text(compact(text) + "\n")


def compact(text: str) -> str:
    """One line for each list of numbers."""
    import re

    return re.sub(r"\[[^\[\]{}\"]*\]", lambda m: re.sub(r"\s+", " ", m[0]), text)


if __name__ == "__main__":
    main()
