"""What a user must know of each merge method; the formulas themselves are in `methods`.

Plain data without torch, so that `--help`, `methods` and `--dry-run` answer at once.

With a base the merged set is the reasoners and the mllm's own tower: tau_i = reasoner_i - base,
tau_m = mllm - base, and the result is base + scale * merge(tau_m, tau_1, ..., tau_k). Without one,
two-model methods go from the mllm (t = 0) to the reasoner (t = 1).
"""

from collections.abc import Mapping

Defaults = Mapping[str, Mapping[str, float | bool]]

from drift_merge.maths.methods import METHODS as METHODS  # noqa: E402
from drift_merge.maths.methods import Method as Method  # noqa: E402
