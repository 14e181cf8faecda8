"""The table's entries for methods on task vectors: tau_x = theta_x - theta_b, for each model.

What they are and what they need; the functions are in the modules beside this one.
"""

from typing import Any

from drift_merge.maths.methods.table import SPECTRAL, Method, Survey

_SUM = {"weight": 1.0, "mllm_weight": 1.0, "scale": 1.0}
_GIVEN = {"mllm_weight": 1.0, "scale": 1.0}  # mergekit and PEFT: every weight must be given
_TRIM, _SEED = {"trim": "tensor"}, {"seed": 0}
_RAM_PLUS = {"scale": 1.0, "threshold": 1e-5, "boost": 0.1, "max_overlap": 0.2}
_WEIGHT = ("weight",)
_MERGEKIT_WEIGHTS = {"mergekit": _WEIGHT}
_MERGEKIT_SIGNS = "elects and divides by weights; an exact tie of signs is +"
_PEFT_SIGNS = "elects unweighted, divides by the count; an exact tie of signs is +"

_MEASURED: Any = {"option": "weight", "walks": 1, "gives_weights": True}

TASK_VECTORS = (
    Method(
        name="task-arithmetic",
        summary="add up what each model learned beyond the base",
        formula="base + scale (w_m tau_m + sum w_i tau_i)",
        paper="arXiv 2212.04089, section 2",
        base="required",
        defaults={
            "paper": {**_SUM, "normalize": False, "frank_decay": 0.0, **SPECTRAL},
            "mergekit": {**_GIVEN, "normalize": False},
        },
        required=_MERGEKIT_WEIGHTS,
        surveys=(
            Survey(value="frank", by="frank.survey", by_layer=True, **_MEASURED),
            Survey(value="metagpt", by="frank.survey", **_MEASURED),
        ),
        measured_by="spectral.leading.measure",
        combined_by="spectral.leading.task_arithmetic",
    ),
    Method(
        name="chat-vector",
        summary="add to the mllm what the reasoner learned beyond the base",
        formula="mllm + scale sum w_i (reasoner_i - base)",
        paper="arXiv 2310.04799, section 3",
        base="required",
        defaults={"paper": {"weight": 1.0, "scale": 1.0, **SPECTRAL}},
        adds_to_mllm=True,
        measured_by="spectral.leading.measure",
        combined_by="spectral.leading.chat_vector",
    ),
    Method(
        name="consensus-ta",
        summary="add up, keeping entries that enough models find important",
        formula="base + scale m sum w_i tau_i, m: important to at least `agreement` models",
        paper="arXiv 2405.07813, sections 4 and 5",
        base="required",
        defaults={"paper": {**_SUM, "mask_lambda": 0.6, "agreement": 2.0}},
        combined_by="elementwise.consensus_ta",
    ),
    Method(
        name="ties",
        summary="keep the largest changes, agree on signs, average",
        formula="base + scale mean of the trimmed tau_i that agree with sgn(sum tau_i)",
        paper="arXiv 2306.01708, section 3, algorithm 1",
        base="required",
        defaults={
            "paper": {**_SUM, "density": 0.2, **_TRIM},
            "mergekit": {**_GIVEN, "density": 1.0, "normalize": True, **_TRIM},
            "peft": {**_GIVEN, **_TRIM},
        },
        required={"mergekit": _WEIGHT, "peft": ("weight", "density")},
        notes={
            "paper": "unweighted unless weights are given",
            "mergekit": _MERGEKIT_SIGNS,
            "peft": _PEFT_SIGNS,
        },
        measured_by="trimming.measure_ties",
        surveys=(Survey(option="trim", value="global", walks=2, by="global_trimming.survey"),),
        combined_by="trimming.ties",
    ),
    Method(
        name="breadcrumbs",
        summary="drop the largest and the smallest changes, add up the rest",
        formula="base + scale sum w_i m_i tau_i, m_i without the largest gamma and the small",
        paper="arXiv 2312.06795, section 3",
        base="required",
        defaults={
            "paper": {**_SUM, "density": 0.14, "gamma": 0.01, "normalize": False},
            "mergekit": {**_GIVEN, "density": 1.0, "gamma": 0.01, "normalize": False},
        },
        required=_MERGEKIT_WEIGHTS,
        notes={"mergekit": "rounds counts down; density 1 keeps the outliers too"},
        measured_by="trimming.measure_breadcrumbs",
        combined_by="trimming.breadcrumbs",
    ),
    Method(
        name="breadcrumbs-ties",
        summary="drop the largest and the smallest changes, agree on signs, average",
        formula="base + scale mean of m_i tau_i that agree with sgn(sum m_i tau_i)",
        paper="arXiv 2312.06795, section 3, and 2306.01708; as mergekit joins them",
        base="required",
        defaults={
            "paper": {**_SUM, "density": 0.14, "gamma": 0.01},
            "mergekit": {**_GIVEN, "density": 1.0, "gamma": 0.01, "normalize": False},
        },
        required=_MERGEKIT_WEIGHTS,
        notes={"mergekit": f"{_MERGEKIT_SIGNS}; rounds counts down"},
        measured_by="trimming.measure_breadcrumbs",
        combined_by="trimming.breadcrumbs_ties",
    ),
    Method(
        name="dare-linear",
        summary="drop changes at random, rescale, add up",
        formula="base + scale sum w_i m_i tau_i / density, m_i ~ Bernoulli(density)",
        paper="arXiv 2311.03099, sections 3.2 and 3.3",
        base="required",
        defaults={
            "paper": {**_SUM, **_SEED, "density": 0.1, "normalize": False},
            "mergekit": {**_GIVEN, **_SEED, "density": 1.0, "normalize": False, "rescale": True},
            "peft": {**_GIVEN, **_SEED, "normalize": False},
        },
        required={"mergekit": _WEIGHT, "peft": ("weight", "density")},
        notes={"mergekit": "rescales to the L1 norm of tau_i, not by 1 / density"},
        measured_by="dropping.measure_dare",
        combined_by="dropping.dare_linear",
    ),
    Method(
        name="dare-ties",
        summary="drop changes at random, rescale, agree on signs, average",
        formula="base + scale mean of m_i tau_i / density that agree in sign",
        paper="arXiv 2311.03099, section 3.3, and 2306.01708",
        base="required",
        defaults={
            "paper": {**_SUM, **_SEED, "density": 0.1},
            "mergekit": {**_GIVEN, **_SEED, "density": 1.0, "normalize": False, "rescale": True},
            "peft": {**_GIVEN, **_SEED},
        },
        required={"mergekit": _WEIGHT, "peft": ("weight", "density")},
        notes={"mergekit": f"{_MERGEKIT_SIGNS}; rescales to the L1 norm", "peft": _PEFT_SIGNS},
        measured_by="dropping.measure_dare",
        combined_by="dropping.dare_ties",
    ),
    Method(
        name="della",
        summary="drop small changes more often, rescale, agree on signs, average",
        formula="base + scale mean of m_i tau_i / p_i that agree in sign, p_i by rank in the row",
        paper="arXiv 2406.11617, section 3",
        base="required",
        defaults={
            "paper": {**_SUM, **_SEED, "density": 0.7, "epsilon": 0.15},
            "mergekit": {
                **{**_GIVEN, **_SEED, "density": 1.0, "epsilon": 0.15},
                **{"normalize": True, "rescale": True},
            },
        },
        required=_MERGEKIT_WEIGHTS,
        notes={"mergekit": f"{_MERGEKIT_SIGNS}; rescales to the L1 norm, not by 1 / p"},
        measured_by="dropping.measure_della",
        combined_by="dropping.della",
        row_wise=True,
    ),
    Method(
        name="della-linear",
        summary="drop small changes more often, rescale, add up",
        formula="base + scale sum w_i m_i tau_i / p_i, p_i by rank in the row",
        paper="arXiv 2406.11617, section 3, without its election",
        base="required",
        defaults={
            "paper": {**_SUM, **_SEED, "density": 0.7, "epsilon": 0.15, "normalize": False},
            "mergekit": {
                **{**_GIVEN, **_SEED, "density": 1.0, "epsilon": 0.15},
                **{"normalize": False, "rescale": True},
            },
        },
        required=_MERGEKIT_WEIGHTS,
        notes={"mergekit": "rescales to the L1 norm of tau_i, not by 1 / p"},
        measured_by="dropping.measure_della",
        combined_by="dropping.della_linear",
        row_wise=True,
    ),
    Method(
        name="sce",
        summary="select by variance, weigh by energy, agree on signs",
        formula="base + scale sum eta_i tau_i, high variance and agreeing signs only",
        paper="arXiv 2408.07990, section on SCE",
        base="required",
        defaults={
            "paper": {"scale": 1.0, "density": 0.1},
            "mergekit": {"scale": 1.0, "density": 1.0},
        },
        notes={"mergekit": "divides by the sum of the agreeing eta_i"},
        measured_by="importance.measure_sce",
        combined_by="importance.sce",
    ),
    Method(
        name="ram",
        summary="keep what one model alone has changed, average what several have",
        formula="base + scale tau, tau = tau_i where one alone has |tau_i| > threshold, else mean",
        paper="arXiv 2601.13572",
        base="required",
        defaults={"paper": {"scale": 1.0, "threshold": 1e-5}},
        combined_by="overlap.ram",
    ),
    Method(
        name="ram-plus",
        summary="the same, with what one model alone has changed made a little larger",
        formula="ram with (1 + boost clip(shared_i / unique_i, 0, max_overlap)) tau_i where alone",
        paper="arXiv 2601.13572",
        base="required",
        defaults={
            "paper": {**_RAM_PLUS, "counts": "global"},
            "mergekit": {**_RAM_PLUS, "counts": "tensor"},
        },
        notes={"mergekit": "counts per tensor: its ramplus_tl"},
        measured_by="overlap.measure_ram_plus",
        surveys=(Survey(option="counts", value="global", walks=1, by="overlap.survey"),),
        combined_by="overlap.ram",
    ),
    Method(
        name="magmax",
        summary="take of each entry the largest change",
        formula="base + scale tau, tau: the tau_i of largest |tau_i|, of equal ones the last",
        paper="arXiv 2407.06322, section 4",
        base="required",
        defaults={"paper": {"scale": 0.5}},
        combined_by="overlap.magmax",
    ),
)
