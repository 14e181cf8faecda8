"""The merge methods: pure functions from chunks to chunks, in one table.

With a base the merged set is the reasoners and the mllm's own tower: tau_i = theta_i - theta_b,
tau_m = theta_m - theta_b, and the result is theta_b + scale * merge(tau_m, tau_1, ..., tau_k).
Without one, two-model methods go from the mllm to the reasoner.
"""

from drift_merge.maths.methods.table import Method
from drift_merge.maths.methods.task_vectors import TASK_VECTORS

_MERGEKIT_WEIGHTS = {"mergekit": ("weight",)}  # options that have no default there

_INTERPOLATIONS = (
    Method(
        name="linear",
        formula="(1 - sum w) mllm + sum w_i reasoner_i",
        paper="arXiv 2203.05482, section 2; w = 0.1: arXiv 2505.05464",
        base="none",
        reasoners=(1, None),
        defaults={"paper": {"weight": 0.1}, "mergekit": {"mllm_weight": 1.0, "normalize": True}},
        required=_MERGEKIT_WEIGHTS,
        notes={"mergekit": "the mllm has a weight too; all are divided by their sum"},
        combined_by="elementwise.linear",
    ),
    Method(
        name="inject",
        formula="mllm + scale sum w_i (reasoner_i - mllm)",
        paper="arXiv 2510.15050, section 3",
        base="optional",
        reasoners=(1, None),
        defaults={"paper": {"weight": 1.0, "scale": 0.1, "is_delta": False}},
        combined_by="elementwise.inject",
    ),
    Method(
        name="layer-swap",
        formula="linear with a weight per layer: 0 in kept layers, w elsewhere",
        paper="arXiv 2410.01335, section 3; w = 0.1 after layer 5: arXiv 2505.05464",
        base="none",
        reasoners=(1, None),
        defaults={"paper": {"weight": 0.1}},
        combined_by="elementwise.linear",
    ),
    Method(
        name="passthrough",
        formula="scale reasoner",
        paper="none: a copy",
        base="none",
        reasoners=(1, 1),
        defaults={"paper": {"scale": 1.0}},
        combined_by="elementwise.passthrough",
    ),
    Method(
        name="nearswap",
        formula="mllm + clip(reasoner - mllm, -t, t)",
        paper="none: huggingface.co/alchemonaut/QuartetAnemoi-70B-t0.0001",
        base="none",
        reasoners=(1, 1),
        defaults={"paper": {"t": 1e-4}, "mergekit": {}},
        required={"mergekit": ("t",)},
        notes={"mergekit": "differs below t = 1e-6 only"},
        combined_by="elementwise.nearswap",
    ),
    Method(
        name="arcee-fusion",
        formula="mllm + [I >= median + 1.5 IQR] (reasoner - mllm), I = |difference| KL(row)",
        paper="none: arcee.ai, mergekit",
        base="none",
        reasoners=(1, 1),
        defaults={"paper": {}},
        measured_by="importance.measure_fusion",
        combined_by="importance.arcee_fusion",
        row_wise=True,
    ),
)

_SPHERICAL = (
    Method(
        name="slerp",
        formula="sin((1-u) Omega)/sin(Omega) mllm + sin(u Omega)/sin(Omega) reasoner, u = w t",
        paper="Shoemake 1985, section 3.3; no paper for weights",
        base="none",
        reasoners=(1, 1),
        defaults={
            "paper": {"weight": 1.0, "t": 0.5, "dot_threshold": 1.0},
            "mergekit": {"weight": 1.0, "dot_threshold": 0.9995},
        },
        required={"mergekit": ("t",)},
        notes={"mergekit": "a line where |cos| > dot_threshold"},
        measured_by="spherical.measure_slerp",
        combined_by="spherical.combine",
    ),
    Method(
        name="nuslerp",
        formula="slerp at t = w / (w_m + w); with a base on the task vectors",
        paper="none: mergekit",
        base="optional",
        reasoners=(1, 1),
        defaults={
            "paper": {"weight": 1.0, "mllm_weight": 1.0, "flatten": True, "column_wise": False},
            "mergekit": {"mllm_weight": 1.0, "flatten": True, "column_wise": False},
        },
        required=_MERGEKIT_WEIGHTS,
        notes={"mergekit": "where a tensor is 0 the angle is pi / 2, not a line"},
        measured_by="rows.measure_nuslerp",
        combined_by="rows.nuslerp",
        row_wise=True,
    ),
    Method(
        name="multislerp",
        formula="A m/|m|, m = sum w_i v_i/|v_i|, A = sum w_i |v_i|; v = theta or tau",
        paper="none: goddard.blog/posts/multislerp-wow-what-a-cool-idea",
        base="optional",
        reasoners=(1, None),
        defaults={
            "paper": {"weight": 1.0, "mllm_weight": 1.0, "normalize": True, "eps": 1e-8},
            "mergekit": {"mllm_weight": 1.0, "normalize": True, "eps": 1e-8},
        },
        required=_MERGEKIT_WEIGHTS,
        measured_by="spherical.measure_multislerp",
        combined_by="spherical.combine",
    ),
    Method(
        name="karcher",
        formula="A mu, mu = Karcher mean of v_i/|v_i|, A = sum a_i |v_i|; v = theta or tau",
        paper="Karcher 1977, section 1; no paper for weights",
        base="optional",
        reasoners=(1, None),
        defaults={
            "paper": {
                **{"weight": 1.0, "mllm_weight": 1.0, "normalize": True},
                **{"max_iter": 10.0, "tol": 1e-5},
            },
        },
        measured_by="spherical.measure_karcher",
        combined_by="spherical.combine",
    ),
    Method(
        name="model-stock",
        formula="base + t mean(tau), t = N cos / (1 + (N-1) cos)",
        paper="arXiv 2403.19522, section 4",
        base="required",
        reasoners=(1, None),
        defaults={"paper": {"filter_wise": False}, "mergekit": {"filter_wise": False}},
        notes={"paper": "t is clamped to [0, 1]", "mergekit": "t is not clamped"},
        measured_by="rows.measure_model_stock",
        combined_by="rows.model_stock",
        row_wise=True,
    ),
)

_TABLE = (*_INTERPOLATIONS, *_SPHERICAL, *TASK_VECTORS)

METHODS: dict[str, Method] = {method.name: method for method in _TABLE}

__all__ = ["METHODS", "Method"]
