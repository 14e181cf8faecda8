"""ms-swift: a callback that its command line can name.

    # drift_plugin.py, for: swift sft --external_plugins drift_plugin.py --callbacks drift ...
    from drift_merge.trainers.swift import register
    register("prior/", alpha=1.0)

Its Megatron trainers are not covered: their first step is an error.
"""

from typing import Any

from drift_merge.trainers.hf import DriftCallback
from drift_merge.trainers.wiring import Expectation, Wiring, optional

_swift = optional("swift.callbacks", install="pip install ms-swift")


def register(prior: Any, *, name: str = "drift", **options: Any) -> None:
    """Add a DriftCallback to swift's `callbacks_map`.

    Args:
        prior: as for `attach`.
        name: for `--callbacks`.
        options: as for `hf.DriftCallback`.

    From now on a step of an optimizer in this process before the callback begins is an error.
    """
    Wiring(prior, options)  # a typo fails here, before a model is loaded
    expected = Expectation(
        f"swift has made a step, but its trainer did not begin with the callback {name!r} that"
        " register() has added: it trains without the prior.",
        f"Name it on the command line: --callbacks {name}. (Its Megatron trainers take no"
        " callbacks.) To train without the prior leave the plugin out.",
    )

    def make(args: Any, trainer: Any) -> DriftCallback:
        callback = DriftCallback(prior, **options)
        callback.wiring.expectations.append(expected)
        return callback

    _swift.callbacks_map[name] = make
