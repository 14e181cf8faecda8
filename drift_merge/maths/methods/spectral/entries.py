"""The table's rows for methods on singular directions."""

from drift_merge.maths.methods.table import Method

_SUM = {"weight": 1.0, "mllm_weight": 1.0, "scale": 1.0}
_SHARED = {"calibrate_alpha": 1.0}  # of merges that have dealt with shared directions themselves

SPECTRAL_METHODS = (
    Method(
        name="star",
        summary="average the leading directions of each model, rescaled",
        formula="base + scale mean(w_i N(tau_i)), N: directions with eta % of the singular values",
        paper="arXiv 2502.10339, section 3",
        base="required",
        defaults={"paper": {**_SUM, "eta": 40.0, "norm": "nuclear"}},
        takes_matrices=True,
        measured_by="spectral.subspaces.star",
        combined_by="spectral.sums.on_base",
    ),
    Method(
        name="tsv-m",
        summary="add up the leading directions of every model, made orthogonal",
        formula="base + scale polar(U) S polar(V)^T, U S V^T: the first r / N directions of each",
        paper="arXiv 2412.00081, section 3.3 and algorithm 1",
        base="required",
        defaults={"paper": {**_SUM, **_SHARED}},
        takes_matrices=True,
        measured_by="spectral.subspaces.tsv_m",
        combined_by="spectral.sums.on_base",
    ),
    Method(
        name="iso-c",
        summary="add up what each model learned, with all singular values made equal",
        formula="base + scale mean(S) U V^T, U S V^T = sum w_i tau_i",
        paper="arXiv 2502.04959, section 4.1",
        base="required",
        defaults={"paper": {**_SUM}},
        takes_matrices=True,
        measured_by="spectral.subspaces.iso_c",
        combined_by="spectral.sums.on_base",
    ),
    Method(
        name="iso-cts",
        summary="the same with directions of single models beside the common ones",
        formula="base + scale mean(S) polar(U) polar(V)^T, of common and single directions",
        paper="arXiv 2502.04959, section 4.2",
        base="required",
        defaults={"paper": {**_SUM, "common": 0.8, "calibrate_alpha": 0.2}},
        takes_matrices=True,
        measured_by="spectral.subspaces.iso_cts",
        combined_by="spectral.sums.on_base",
    ),
    Method(
        name="swudi",
        summary="disturb each model's own directions least, in closed form",
        formula="base + scale (t - (t C - D) Q f/l Q^T), t = sum w_i tau_i, C = Q l Q^T",
        paper="none: github.com/WalkerWorldPeace/MLLMerging; objective: arXiv 2503.08099, eq. 8",
        base="required",
        defaults={"paper": {**_SUM, **_SHARED, "time": 300.0, "share": 0.85}},
        takes_matrices=True,
        measured_by="spectral.gram.swudi",
        combined_by="spectral.sums.on_base",
    ),
    Method(
        name="aswudi",
        summary="the same with the number of directions found per matrix",
        formula="base + scale (t - (t C - D) Q f/l Q^T), f = 1 on (sum sqrt(l))^2 / sum l values",
        paper="none: github.com/WalkerWorldPeace/MLLMerging; objective: arXiv 2503.08099, eq. 8",
        base="required",
        defaults={"paper": {**_SUM, **_SHARED}},
        takes_matrices=True,
        measured_by="spectral.gram.swudi",
        combined_by="spectral.sums.on_base",
    ),
)
