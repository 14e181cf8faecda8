"""The merge methods: pure functions from chunks to chunks, in one table.

With a base the merged set is the reasoners and the mllm's own tower: tau_i = theta_i - theta_b,
tau_m = theta_m - theta_b, and the result is theta_b + scale * merge(tau_m, tau_1, ..., tau_k).
Without one, two-model methods go from the mllm to the reasoner.

It promises that a method is a row of the table, and that `--help` needs no torch. It must not know
files, names of tensors, or who calls it. Read: options, table, taus, signs, elementwise,
trimming, dropping, importance, spherical, angles, overlap, frank, global_trimming, spectral,
entries, entries_on_base, own.
"""

from dataclasses import replace

from drift_merge.maths.methods.entries import INTERPOLATIONS, SPHERICAL
from drift_merge.maths.methods.entries_on_base import TASK_VECTORS
from drift_merge.maths.methods.spectral.entries import SPECTRAL_METHODS
from drift_merge.maths.methods.table import CALIBRATION, Method


def _calibrated(method: Method) -> Method:
    """A row with the options of calibration, if it has a merged task vector to calibrate."""
    if method.base != "required":
        return method
    defaults = {name: {**CALIBRATION, **row} for name, row in method.defaults.items()}
    return replace(method, defaults=defaults)


_TABLE = (*INTERPOLATIONS, *SPHERICAL, *TASK_VECTORS, *SPECTRAL_METHODS)

METHODS: dict[str, Method] = {method.name: _calibrated(method) for method in _TABLE}

__all__ = ["METHODS", "Method"]
