"""`inspect --spectra`: against numpy's singular values."""

import numpy as np
import pytest

from drift_merge.priors.spectra import spectra
from tests.training.toys import make_toy


def test_stable_rank_and_first_share_are_those_of_the_singular_values(tmp_path):
    toy = make_toy(tmp_path)
    found = {row.module: row for row in spectra(toy.prior)}
    assert set(found) == {"attn", "mlp"}  # norms are vectors
    for module, row in found.items():
        names = [n for n, e in toy.prior.tensors.items() if e["module"] == module]
        deltas = [toy.deltas()[n].double().numpy() for n in names]
        values = [np.linalg.svd(d, compute_uv=False) for d in deltas if d.ndim == 2]
        ranks = [float((s**2).sum() / s[0] ** 2) for s in values]
        assert row.num_matrices == len(values)
        assert row.stable_rank == pytest.approx(np.median(ranks), rel=1e-4)
        assert row.least_stable_rank == pytest.approx(min(ranks), rel=1e-4)
        share = sum(s[0] ** 2 for s in values) / sum((s**2).sum() for s in values)
        assert row.first_share == pytest.approx(share, rel=1e-4)
