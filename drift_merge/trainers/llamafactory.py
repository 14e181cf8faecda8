"""LLaMA-Factory: its training with a prior; the YAML is its own.

# train_drift.py, run as: torchrun --nproc-per-node N train_drift.py config.yaml
from drift_merge.trainers.llamafactory import run_exp
run_exp("prior/", alpha=1.0)
"""

from typing import Any

from drift_merge.trainers.hf import DriftCallback
from drift_merge.trainers.wiring import optional

_tuner = optional("llamafactory.train.tuner", install="pip install llamafactory")


def run_exp(prior: Any, *, args: dict[str, Any] | None = None, **options: Any) -> None:
    """Run LLaMA-Factory's `run_exp` with a DriftCallback.

    Args:
        prior: as for `attach`.
        args: its arguments; None reads them from the command line, as `llamafactory-cli train`.
        options: as for `hf.DriftCallback`.
    """
    _tuner.run_exp(args=args, callbacks=[DriftCallback(prior, **options)])
