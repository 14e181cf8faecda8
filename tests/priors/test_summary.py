"""The table by module: sums over tensors as one long vector, against numpy."""

import shutil
from math import prod

import numpy as np
import pytest

from drift_merge.priors.summary import advice, equal_sentence, show_share, summarize
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
        assert row.equal == pytest.approx(np.mean(one == other))


def test_tensors_with_nan_count_as_zero_and_do_not_break_the_table():
    empty = dict.fromkeys(("norm_delta", "norm_mllm", "norm_reasoner", "cosine"))
    rows = summarize({"x": empty | {"module": "mlp", "shape": [2, 3], "equal": None}})
    assert [row.equal for row in rows] == [None, None]
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


def test_rl_on_a_base_is_seen_by_its_equal_entries(tmp_path, call):
    pair, base = c.make_pair(tmp_path), tmp_path / "base"
    tensors = c.read_tensors(pair.reasoner)
    shutil.copytree(pair.reasoner, base)
    changed = {}
    for name, tensor in tensors.items():
        values = tensor.values.copy()
        values.reshape(-1)[0] += 1.0  # one entry of each tensor
        changed[name] = c.store(values, tensor.dtype)
    c.write_shard(next(base.glob("*.safetensors")), changed)
    made = run_prior(*pair, tmp_path / "out", base=str(base))
    for entry in made.prior.tensors.values():
        size = prod(entry["shape"])
        assert entry["equal"] == (size - 1) / size
    (row, *_, last) = summarize(made.prior.tensors)
    shown = call("drift-prior", "inspect", str(tmp_path / "out"))
    assert f"Exactly equal entries of reasoner and base: {last.equal:.2%}: few" in shown.out
    assert f"{row.equal:.2%}" in shown.out
    assert f"{row.equal:.2%}" in (tmp_path / "out/README.md").read_text()


def test_a_prior_of_an_older_version_has_no_share(tmp_path):
    made = run_prior(*c.make_pair(tmp_path), tmp_path / "out")
    for entry in made.prior.tensors.values():
        del entry["equal"]
    assert show_share(summarize(made.prior.tensors)[-1].equal) == "-"
    assert equal_sentence(summarize(made.prior.tensors), "mllm") == ""
