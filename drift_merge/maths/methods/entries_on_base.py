"""The table's entries for methods on task vectors: tau_x = theta_x - theta_b, for each model.

What they are and what they need; the functions are in the modules beside this one.
"""

from drift_merge.maths.methods.table import Method, Survey

_SUM = {"weight": 1.0, "mllm_weight": 1.0, "scale": 1.0}
_GIVEN = {"mllm_weight": 1.0, "scale": 1.0}  # mergekit and PEFT: every weight must be given
_TRIM, _SEED = {"trim": "tensor"}, {"seed": 0}
_WEIGHT = ("weight",)
_MERGEKIT_WEIGHTS = {"mergekit": _WEIGHT}
_MERGEKIT_SIGNS = "elects and divides by weights; an exact tie of signs is +"
_PEFT_SIGNS = "elects unweighted, divides by the count; an exact tie of signs is +"

TASK_VECTORS = (
    Method(
        name="task-arithmetic",
        summary="add up what each model learned beyond the base",
        formula="base + scale (w_m tau_m + sum w_i tau_i)",
        paper="arXiv 2212.04089, section 2",
        base="required",
        defaults={
            "paper": {**_SUM, "normalize": False},
            "mergekit": {**_GIVEN, "normalize": False},
        },
        required=_MERGEKIT_WEIGHTS,
        surveys=(
            Survey(
                option="weight",
                value="frank",
                walks=1,
                by="frank.survey",
                by_layer=True,
                gives_weights=True,
            ),
        ),
        combined_by="elementwise.task_arithmetic",
    ),
    Method(
        name="chat-vector",
        summary="add to the mllm what the reasoner learned beyond the base",
        formula="mllm + scale sum w_i (reasoner_i - base)",
        paper="arXiv 2310.04799, section 3",
        base="required",
        defaults={"paper": {"weight": 1.0, "scale": 1.0}},
        adds_to_mllm=True,
        combined_by="elementwise.chat_vector",
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
)
