"""The merge methods: pure functions from chunks to chunks, in one table.

With a base the merged set is the reasoners and the mllm's own tower: tau_i = theta_i - theta_b,
tau_m = theta_m - theta_b, and the result is theta_b + scale * merge(tau_m, tau_1, ..., tau_k).
Without one, two-model methods go from the mllm to the reasoner.

It promises that a method is a row of the table, and that `--help` needs no torch. It must not know
files, names of tensors, or who calls it. Read: options, table, taus, signs, elementwise,
trimming, dropping, importance, spherical, angles, frank, global_trimming, entries,
entries_on_base, own.
"""

from drift_merge.maths.methods.entries import INTERPOLATIONS, SPHERICAL
from drift_merge.maths.methods.entries_on_base import TASK_VECTORS
from drift_merge.maths.methods.table import Method

_TABLE = (*INTERPOLATIONS, *SPHERICAL, *TASK_VECTORS)

METHODS: dict[str, Method] = {method.name: method for method in _TABLE}

__all__ = ["METHODS", "Method"]
