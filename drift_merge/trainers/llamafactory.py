"""LLaMA-Factory: its training with a prior; the YAML is its own.

# train_drift.py, run as: torchrun --nproc-per-node N train_drift.py config.yaml
from drift_merge.trainers.llamafactory import run_exp
run_exp("prior/", alpha=1.0)
"""

import os
from typing import Any

from drift_merge.errors import RecipeError
from drift_merge.trainers.hf import DriftCallback
from drift_merge.trainers.wiring import Expectation, optional

_tuner = optional("llamafactory.train.tuner", install="pip install llamafactory")
_DROPS = ("USE_MEGATRON_BRIDGE", "USE_MCA")  # its Megatron trainers take no callbacks of ours


def run_exp(prior: Any, *, args: dict[str, Any] | None = None, **options: Any) -> None:
    """Run LLaMA-Factory's `run_exp` with a DriftCallback.

    Args:
        prior: as for `attach`.
        args: its arguments; None reads them from the command line, as `llamafactory-cli train`.
        options: as for `hf.DriftCallback`.

    Raises:
        RecipeError: it trains with Megatron, or makes a step without having called the callback.
    """
    callback = DriftCallback(prior, **options)
    for name in _DROPS:
        if os.environ.get(name, "").lower() in ("1", "true", "yes", "y", "on"):
            raise RecipeError(
                f"{name} is set: LLaMA-Factory then trains with Megatron and drops callbacks, and"
                " the prior with them.",
                remedy=f"Unset it: env -u {name} torchrun ...",
            )
    expected = Expectation(
        "LLaMA-Factory has made a step without calling the DriftCallback: its trainer drops"
        " callbacks, and the prior with them.",
        "Use one of its trainers that are transformers' (stage sft, full or lora, no Megatron).",
    )
    callback.wiring.expectations.append(expected)
    try:
        _tuner.run_exp(args=args, callbacks=[callback])
    finally:
        expected.end()
