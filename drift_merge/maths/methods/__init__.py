"""The merge methods: pure functions from chunks to chunks, in one table.

With a base the merged set is the reasoners and the mllm's own tower: tau_i = theta_i - theta_b,
tau_m = theta_m - theta_b, and the result is theta_b + scale * merge(tau_m, tau_1, ..., tau_k).
Without one, two-model methods go from the mllm to the reasoner.
"""

from drift_merge.maths.methods import elementwise
from drift_merge.maths.methods.table import Combine, Measure, Method, State

_SUM = {"weight": 1.0, "mllm_weight": 1.0, "scale": 1.0}

_TABLE = (
    Method(
        name="linear",
        formula="(1 - sum w) mllm + sum w_i reasoner_i",
        paper="arXiv 2203.05482, section 2; w = 0.1: arXiv 2505.05464",
        base="none",
        reasoners=(1, None),
        defaults={"paper": {"weight": 0.1}, "mergekit": {"mllm_weight": 1.0, "normalize": True}},
        notes={"mergekit": "every weight is given, the mllm's too, and divided by their sum"},
        combine=elementwise.linear,
    ),
    Method(
        name="task-arithmetic",
        formula="base + scale (w_m tau_m + sum w_i tau_i)",
        paper="arXiv 2212.04089, section 2",
        base="required",
        reasoners=(1, None),
        defaults={
            "paper": {**_SUM, "normalize": False},
            "mergekit": {"mllm_weight": 1.0, "scale": 1.0, "normalize": False},
        },
        notes={"mergekit": "weights must be given; normalize divides by their sum"},
        combine=elementwise.task_arithmetic,
    ),
    Method(
        name="inject",
        formula="mllm + scale sum w_i (reasoner_i - mllm)",
        paper="arXiv 2510.15050, section 3",
        base="optional",
        reasoners=(1, None),
        defaults={"paper": {"weight": 1.0, "scale": 0.1, "is_delta": False}},
        combine=elementwise.inject,
    ),
    Method(
        name="chat-vector",
        formula="mllm + scale sum w_i (reasoner_i - base)",
        paper="arXiv 2310.04799, section 3",
        base="required",
        reasoners=(1, None),
        defaults={"paper": {"weight": 1.0, "scale": 1.0}},
        combine=elementwise.chat_vector,
    ),
    Method(
        name="layer-swap",
        formula="linear, with a weight per layer: 0 in kept layers, w elsewhere",
        paper="arXiv 2410.01335, section 3; w = 0.1 after layer 5: arXiv 2505.05464",
        base="none",
        reasoners=(1, None),
        defaults={"paper": {"weight": 0.1}},
        combine=elementwise.linear,
    ),
    Method(
        name="passthrough",
        formula="scale reasoner",
        paper="none: a copy",
        base="none",
        reasoners=(1, 1),
        defaults={"paper": {"scale": 1.0}},
        combine=elementwise.passthrough,
    ),
    Method(
        name="nearswap",
        formula="mllm + clip(reasoner - mllm, -t, t)",
        paper="none: huggingface.co/alchemonaut/QuartetAnemoi-70B-t0.0001",
        base="none",
        reasoners=(1, 1),
        defaults={"paper": {"t": 1e-4}, "mergekit": {}},
        notes={"mergekit": "t must be given; differs below t = 1e-6 only"},
        combine=elementwise.nearswap,
    ),
    Method(
        name="consensus-ta",
        formula="base + scale m sum w_i tau_i, m: important to at least `agreement` models",
        paper="arXiv 2405.07813, sections 4 and 5",
        base="required",
        reasoners=(1, None),
        defaults={"paper": {**_SUM, "mask_lambda": 0.6, "agreement": 2.0}},
        combine=elementwise.consensus_ta,
    ),
)

METHODS: dict[str, Method] = {method.name: method for method in _TABLE}

__all__ = ["METHODS", "Combine", "Measure", "Method", "State"]
