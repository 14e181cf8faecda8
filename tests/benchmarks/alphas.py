"""What alpha means under SGD and under AdamW: distance and bias by rule. `python alphas.py [PLACE]`

Trains the small MLLM of the tests on its random tokens, whose gradients are noise, for 50 steps.
"bias / gradient" is that of the first step, the other figures are the distance after the last.
Takes some minutes on one core.
"""

import sys
import tempfile
import warnings
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

import drift_merge
from drift_merge.training.options import RULE_TRAITS
from tests.training.toys import Toy, loss_of, make_toy

STEPS, RATE = 50, 1e-4
ALPHAS = (1e-4, 1e-3, 1e-2, 0.1, 0.3, 1.0, 3.0, 10.0)


def run(toy: Toy, kind: str, rule: str, alpha: float) -> tuple[float, float]:
    """The strength at the first step and the distance after the last."""
    model = toy.model()
    optimizer = getattr(torch.optim, kind)(model.parameters(), lr=RATE)
    handle = drift_merge.attach(model, toy.prior, rule=rule, alpha=alpha, optimizer=optimizer)
    strength = 0.0
    for step in range(STEPS):
        loss_of(model, step).backward()
        optimizer.step()
        optimizer.zero_grad()
        strength = strength or handle.report()["bias_ratio"] or 0.0
    return strength, handle.report()["distance"]


def main(place: Path) -> None:
    """Print one line for each rule and optimizer."""
    warnings.filterwarnings("ignore", "the bias is .* times the gradient")
    toy = make_toy(place)
    print("| rule | default | |" + "".join(f" {alpha:g} |" for alpha in ALPHAS))
    print("|---|--:|---|" + "--:|" * (len(ALPHAS)))
    for rule, traits in RULE_TRAITS.items():
        for kind in ("SGD", "AdamW"):
            found = [run(toy, kind, rule, alpha) for alpha in ALPHAS]
            cells = "".join(f" {distance:.2g} |" for _, distance in found)
            print(f"| `{rule}` | {traits.alpha:g} | {kind} |{cells}", flush=True)
        cells = "".join(f" {strength:.2g} |" for strength, _ in found)
        print(f"| | | bias / gradient |{cells}", flush=True)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as directory:
            main(Path(directory))
