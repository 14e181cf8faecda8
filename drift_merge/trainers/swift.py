"""ms-swift: a callback that its command line can name.

    # drift_plugin.py, for: swift sft --external_plugins drift_plugin.py --callbacks drift ...
    from drift_merge.trainers.swift import register
    register("prior/", alpha=1.0)

Its Megatron trainers are not covered.
"""

from typing import Any

from drift_merge.trainers.hf import DriftCallback
from drift_merge.trainers.wiring import Wiring, optional

_swift = optional("swift.callbacks", install="pip install ms-swift")


def register(prior: Any, *, name: str = "drift", **options: Any) -> None:
    """Add a DriftCallback to swift's `callbacks_map`.

    Args:
        prior: as for `attach`.
        name: for `--callbacks`.
        options: as for `hf.DriftCallback`.
    """
    Wiring(prior, options)  # a typo fails here, before a model is loaded

    def make(args: Any, trainer: Any) -> DriftCallback:
        return DriftCallback(prior, **options)

    _swift.callbacks_map[name] = make
