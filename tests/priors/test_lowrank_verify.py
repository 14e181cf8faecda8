"""A low-rank prior that another processor made: near in what it says, not in its bytes."""

import pytest
import torch
from safetensors.torch import save_file

from drift_merge.artifacts import nearness
from drift_merge.engine.storing import factoring
from drift_merge.errors import VerificationError
from drift_merge.maths.spectra.matrices import Matrix
from drift_merge.plans.plan import Step
from drift_merge.priors.manifest import open_prior
from drift_merge.priors.verify import verify_prior
from tests.checkpoints import make_pair
from tests.runs import run_prior

NUM_MATRICES, NUM_TENSORS = 14, 20  # of two layers, with six biases


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return make_pair(tmp_path_factory.mktemp("pair"), layers=2)


def verified(pair, path):
    sources = {"reasoner": str(pair.reasoner), "mllm": str(pair.mllm)}
    return verify_prior(open_prior(path), **sources, sample=100)


def test_equal_bytes_are_no_case_of_a_tolerance(pair, tmp_path, monkeypatch):
    run_prior(*pair, tmp_path / "prior", rank=2)
    monkeypatch.delattr(nearness._OfFactors, "measure")
    report = verified(pair, tmp_path / "prior")
    assert (len(report.recomputed), report.near) == (NUM_TENSORS, ())


def turned(found, change):
    """Other factors of the same product but for `change`: the first pair has other signs."""
    signs = torch.tensor([-1.0, 1.0])[: found.u.shape[1]]
    values = found.values * (1 + change)
    return type(found)(found.u * signs, values, found.v * signs, found.error)


@pytest.mark.parametrize(("change", "is_near"), [(0.0, True), (0.02, True), (0.2, False)])
def test_other_factors_are_near_by_their_product(change, is_near, pair, tmp_path, monkeypatch):
    leading = factoring.leading
    with monkeypatch.context() as patched:
        patched.setattr(factoring, "leading", lambda *given: turned(leading(*given), change))
        run_prior(*pair, tmp_path / "prior", rank=2, norm="none")
    if not is_near:
        with pytest.raises(VerificationError, match=r"is off by .* more than 5%"):
            verified(pair, tmp_path / "prior")
        return
    report = verified(pair, tmp_path / "prior")
    assert len(report.near) == NUM_MATRICES


@pytest.mark.parametrize("rows", [(7,), (4, 3)])
def test_a_distance_is_that_of_the_products(rows, tmp_path):
    """Of a tensor of one matrix, and of two below each other, against the dense difference."""
    cols, rank, name = 5, 2, "layers.0.mlp.up_proj.weight"
    spans = [(sum(rows[:i]), sum(rows[: i + 1])) for i in range(len(rows))]
    matrices = tuple(Matrix((span,), (0, cols, 1)) for span in spans)
    step = Step(name, "prior", "F32", (7, cols), (), matrices=matrices, rank=rank)
    random = torch.Generator().manual_seed(0)
    shapes = {each: shape for each, _, shape in step.stored}
    old, made = ({n: torch.randn(s, generator=random) for n, s in shapes.items()} for _ in "ab")
    save_file(old, tmp_path / "prior.safetensors")
    found = nearness.distances(tmp_path, [step], {name: {}})[name]
    for each, info in nearness.read_shards(tmp_path, ["prior.safetensors"])[
        "prior.safetensors"
    ].tensors.items():
        data = made[each].numpy().tobytes()
        found.write(info, 0, memoryview(data[:12]))
        found.write(info, 12, memoryview(data[12:]))
    wide = [
        torch.cat(
            [
                factors[f"{name}:u"][a:b].double()
                @ factors[f"{name}:v"][i * cols : (i + 1) * cols].double().T
                for i, (a, b) in enumerate(spans)
            ]
        )
        for factors in (old, made)
    ]
    expected = float((wide[0] - wide[1]).norm()), float(wide[0].norm())
    assert found.measure({}) == pytest.approx(expected, rel=1e-9)
