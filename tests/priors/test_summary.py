"""The table by module: sums over tensors as one long vector, against numpy."""

import numpy as np
import pytest

from drift_merge.priors.summary import advice, summarize
from tests import checkpoints as c
from tests.runs import run_prior


def test_rows_are_the_norms_and_cosines_of_all_tensors_of_a_module_joined(tmp_path):
    pair = c.make_pair(tmp_path)
    made = run_prior(*pair, tmp_path / "out", modules="attn,mlp,norm")
    rows = {row.module: row for row in summarize(made.prior.tensors)}
    assert list(rows) == ["attn", "mlp", "norm", "all"]
    ours, theirs = c.read_tensors(pair.reasoner), c.read_tensors(pair.mllm)
    for module, row in rows.items():
        names = [e["mllm"] for e in made.prior.tensors.values() if module in ("all", e["module"])]
        one, other = (
            np.concatenate([side[n].values.astype(np.float64).ravel() for n in names])
            for side in (ours, theirs)
        )
        norms = np.linalg.norm(one), np.linalg.norm(other)
        assert row.num_tensors == len(names)
        assert row.num_elements == one.size
        assert row.norm_delta == pytest.approx(np.linalg.norm(one - other), rel=1e-5)
        assert row.relative_norm == pytest.approx(np.linalg.norm(one - other) / norms[1], rel=1e-5)
        assert row.cosine == pytest.approx(one @ other / (norms[0] * norms[1]), rel=1e-5)


def test_tensors_with_nan_count_as_zero_and_do_not_break_the_table():
    empty = dict.fromkeys(("norm_delta", "norm_mllm", "norm_reasoner", "cosine"))
    rows = summarize({"x": empty | {"module": "mlp", "shape": [2, 3]}})
    assert [(r.module, r.num_elements, r.cosine) for r in rows] == [
        ("mlp", 6, 0.0),
        ("all", 6, 0.0),
    ]


@pytest.mark.parametrize(
    ("cosine", "words"),
    [
        (-0.1, "not relatives"),
        (0.29, "not relatives"),
        (0.3, "far apart"),
        (0.79, "far apart"),
        (0.8, "between"),
        (0.96, "between"),
        (0.97, "close relatives"),
        (1.0, "close relatives"),
    ],
)
def test_the_advice_follows_the_published_pairs(cosine, words):
    assert words in advice(cosine)
    assert f"{cosine:.3f}" in advice(cosine)
