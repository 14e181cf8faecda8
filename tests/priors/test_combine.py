"""Combined priors beside float64 sums of the tensors of their parts."""

import pytest
import torch

import drift_merge
from drift_merge.engine.job import RunOptions
from drift_merge.errors import AlignmentError, OutputError, RecipeError, VerificationError
from drift_merge.priors.card import compute_command
from drift_merge.priors.combine import combine_priors, plan_combination
from drift_merge.priors.deltas import open_deltas
from drift_merge.priors.manifest import open_prior
from drift_merge.priors.verify import verify_prior
from tests import checkpoints as c
from tests.artifacts.damage import flip
from tests.runs import run_prior

EPS = torch.finfo(torch.float32).eps
COMMAND = "drift-prior combine a b -o DIR"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("combine")


@pytest.fixture(scope="module")
def pair(folder):
    """Two priors of one mllm."""
    reasoner, mllm = c.make_pair(folder)
    other = c.write_checkpoint(folder / "other", c.reasoner_tensors(seed=7), config=c.text_config())
    found = []
    for name, source in (("one", reasoner), ("two", other or folder / "other")):
        run_prior(source, mllm, folder / name, dtype="float32", modules="attn,mlp,norm")
        found.append(open_prior(folder / name))
    return found


def read(prior):
    with open_deltas(prior) as deltas:
        return {name: deltas.read(name).double().clone() for name in prior.tensors}


def combined(out, *priors, weights=(), threads=1, **how):
    plan = plan_combination(priors, weights, **{"dtype": "float32", **how})
    return combine_priors(priors, plan, COMMAND, out, RunOptions(threads=threads)).prior


def assert_sum(prior, expected, scale):
    found = read(prior)
    assert found.keys() == expected.keys()
    for name, delta in expected.items():
        limit = 4 * EPS * scale[name]
        assert (found[name] - delta).abs().max() <= limit, name
        entry = prior.tensors[name]
        assert entry["norm_delta"] == pytest.approx(float(delta.norm()), rel=1e-5, abs=limit)
        assert entry["max_abs_delta"] == pytest.approx(float(delta.abs().max()), abs=limit)
    verify_prior(prior)


def scales(*parts):
    return {name: sum(float(part[name].abs().max()) for part in parts) for name in parts[0]}


@pytest.mark.parametrize("weights", [(), (0.7, 0.3), (1.0, -2.0)])
def test_a_sum_is_the_sum_of_its_parts(pair, tmp_path, weights):
    one, two = map(read, pair)
    first, second = weights or (1.0, 1.0)
    made = combined(tmp_path / "out", *pair, weights=weights)
    expected = {name: first * one[name] + second * two[name] for name in one}
    assert_sum(made, expected, scales(one, two, two))
    assert made.manifest["combined_from"]["prior_2"]["seal"] == pair[1].manifest["seal"]
    assert compute_command(made.manifest) == COMMAND


def test_one_prior_is_negated_and_restricted(pair, tmp_path):
    made = combined(tmp_path / "out", pair[0], weights=(-1.0,), modules="attn", layers="1")
    own = {n: -d for n, d in read(pair[0]).items() if n.startswith("layers.1.self_attn.")}
    assert own
    for name, delta in read(made).items():
        assert torch.equal(delta, own.pop(name))
    assert not own
    parameters = made.manifest["parameters"]
    assert (parameters["modules"], parameters["layers"]) == ("attn", "1")


def test_orthogonal_takes_out_the_part_along_the_second(pair, tmp_path):
    one, two = map(read, pair)
    made = combined(tmp_path / "out", *pair, weights=(0.5,), orthogonal=True)
    expected = {
        name: 0.5 * (d - (d * two[name]).sum() / two[name].square().sum() * two[name])
        for name, d in one.items()
    }
    assert_sum(made, expected, scales(one, two))
    for name, delta in read(made).items():
        cosine = (delta * two[name]).sum() / (one[name].norm() * two[name].norm())
        assert abs(float(cosine)) <= 1e-5


def test_a_prior_without_itself_is_nothing(pair, tmp_path):
    made = combined(tmp_path / "out", pair[0], pair[0], orthogonal=True)
    assert all(not delta.any() for delta in read(made).values())


def test_low_rank_and_8_bit_parts_and_outputs_are_read_and_written(pair, tmp_path):
    low = combined(tmp_path / "low", pair[0], rank=2, norm="none")
    small = combined(tmp_path / "small", pair[1], dtype="int8")
    made = combined(tmp_path / "out", low, small, weights=(1.0, -1.0))
    one, two = read(low), read(small)
    assert_sum(made, {name: one[name] - two[name] for name in one}, scales(one, two))
    name = "layers.0.mlp.up_proj.weight"
    u, values, vt = torch.linalg.svd(read(pair[0])[name], full_matrices=False)
    expected = (u[:, :2] * values[:2]) @ vt[:2]
    assert (one[name] - expected).norm() <= 1e-4 * expected.norm()
    assert low.tensors[name]["rank"] == 2


def test_the_result_is_applied_as_any_prior(pair, folder, tmp_path):
    made = combined(tmp_path / "out", *pair, modules="attn,mlp", weights=(0.5, 0.5))
    drift_merge.apply(
        made.path, folder / "mllm", tmp_path / "merged", scale=1.0, dtype="float32", progress=False
    )
    merged = c.read_tensors(tmp_path / "merged")
    before = c.read_tensors(folder / "mllm")
    for name, delta in read(made).items():
        stored = made.tensors[name]["mllm"]
        theta = torch.from_numpy(before[stored].values.astype("float64")).view(delta.shape)
        after = torch.from_numpy(merged[stored].values.astype("float64")).view(delta.shape)
        assert (after - theta - delta).abs().max() <= 4 * EPS * theta.abs().max()


def test_same_bytes_for_any_threads(pair, tmp_path):
    for threads in (1, 3):
        combined(tmp_path / str(threads), *pair, threads=threads, orthogonal=True, rank=2)
    assert c.read_files(tmp_path / "1") == c.read_files(tmp_path / "3")


def test_what_cannot_be_combined_is_refused(pair, folder, tmp_path):
    one, two = pair
    for wrong in (
        {"weights": (1.0,)},
        {"weights": (0.0, 1.0)},
        {"weights": (1.0, 1.0), "orthogonal": True},
        {"modules": "embed"},
        {"modules": "attn,embed"},
        {"layers": "-1"},
    ):
        with pytest.raises(RecipeError):
            combined(tmp_path / "out", one, two, **wrong)
    with pytest.raises(RecipeError, match="two priors"):
        combined(tmp_path / "out", one, orthogonal=True)
    part = combined(tmp_path / "part", two, modules="attn")
    with pytest.raises(AlignmentError, match="has no delta"):
        combined(tmp_path / "out", one, part)
    combined(tmp_path / "ok", one, part, modules="attn")
    with pytest.raises(OutputError):
        combined(two.path / "inside", one, two)
    with pytest.raises(RecipeError, match="combination"):
        verify_prior(part, reasoner=str(folder / "other"), mllm=str(folder / "mllm"))
    assert not (tmp_path / "out").exists()


def test_priors_of_other_mllms_are_refused(pair, tmp_path):
    reasoner, _ = c.make_pair(tmp_path)
    c.write_checkpoint(tmp_path / "else", c.mllm_tensors(seed=9), config=c.mllm_config())
    run_prior(reasoner, tmp_path / "else", tmp_path / "prior", modules="attn,mlp,norm")
    with pytest.raises(AlignmentError, match="different mllms"):
        combined(tmp_path / "out", pair[0], open_prior(tmp_path / "prior"))


def test_a_damaged_part_is_found(pair, tmp_path):
    part = combined(tmp_path / "part", pair[1])
    flip(next(part.path.glob("*.safetensors")), -3)
    with pytest.raises(VerificationError):
        combined(tmp_path / "out", pair[0], part)
    assert not list(tmp_path.glob("out*"))
