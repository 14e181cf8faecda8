"""Models in memory patched, and directions that are none."""

import pytest
import torch

import drift_merge
from drift_merge.errors import AlignmentError, RecipeError
from tests import checkpoints as c
from tests.runs import as_tensor
from tests.searches.small import near, search
from tests.training import toys

pytest.importorskip("optuna")


@pytest.mark.parametrize("is_fused", [False, True])
def test_a_live_model_is_patched_to_what_the_checkpoint_would_hold_and_put_back(tmp_path, is_fused):
    toy = toys.make_toy(tmp_path, stored="BF16")
    before = toys.memory_tensors(toy.pair.mllm)
    before = toys.fuse(before) if is_fused else before
    model = toys.holder({name: tensor.clone() for name, tensor in before.items()})
    model.requires_grad_(False)
    seen = []

    def objective(live):
        assert live is model
        seen.append({name: p.detach().clone() for name, p in live.named_parameters()})
        return float(len(seen))

    found = search(toy.pair, objective, ["weight=0.1,0.3"], model=model, trials=2)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]), name
        assert not parameter.requires_grad
    unmerged, default, *trials = seen
    assert all(torch.equal(unmerged[name], before[name]) for name in before)
    by_weight = {0.1: default}
    by_weight |= {
        t["parameters"]["weight"]: s for t, s in zip(found["trials"], trials, strict=True)
    }
    for weight, patched in by_weight.items():
        out = tmp_path / f"merge-{weight}"
        drift_merge.linear(
            str(toy.pair.reasoner), str(toy.pair.mllm), out, weights=weight, progress=False
        )
        expected = toys.memory_tensors(out)
        expected = toys.fuse(expected) if is_fused else expected
        assert all(torch.equal(patched[name], expected[name]) for name in expected)
        assert any(not torch.equal(patched[name], before[name]) for name in before)


def test_another_model_than_the_mllm_is_not_patched(tmp_path):
    toy = toys.make_toy(tmp_path, stored="BF16")
    tensors = toys.memory_tensors(toy.pair.mllm)
    model = toys.holder({name: tensor + 1 for name, tensor in tensors.items()})
    with pytest.raises(AlignmentError, match="the model is not mllm"):
        search(toy.pair, pytest.fail, model=model)


@pytest.mark.slow
def test_null_reasoners_are_as_far_away_in_random_directions(tmp_path):
    toy = toys.make_toy(tmp_path, stored="BF16")
    out = tmp_path / "best"
    found = search(toy.pair, near(0.2), output=out, trials=2, null="random")
    null = tmp_path / "best.search" / "null-1"
    assert found["base_recipe"]["reasoner"] == str(null)
    stored = {n: as_tensor(t).double() for n, t in c.read_tensors(null).items()}
    mllm = {n: as_tensor(t).double() for n, t in c.read_tensors(toy.pair.mllm).items()}
    deltas, num_random = toy.deltas(), 0
    for name, origin in mllm.items():
        canonical = name.removeprefix("model.")
        if canonical not in deltas:
            assert torch.equal(stored[name], origin), name
            continue
        delta, random = deltas[canonical].double(), stored[name] - origin
        # float32 holds each entry to half a unit in the last place of the larger of both.
        tolerance = 2**-23 * float(origin.abs().max()) * origin.numel() ** 0.5
        assert float(random.norm()) == pytest.approx(float(delta.norm()), rel=1e-5, abs=tolerance)
        if delta.numel() >= 64:
            cosine = float((random * delta).sum() / random.norm() / delta.norm())
            assert abs(cosine) < 5 / delta.numel() ** 0.5
            z = random / random.std()
            assert abs(float((z**4).mean()) - 3) < 5 * (96 / z.numel()) ** 0.5  # normal
            num_random += 1
    assert num_random > 5
    with pytest.raises(RecipeError, match="begun with another sources and null"):
        search(toy.pair, near(0.2), output=out, trials=2)
