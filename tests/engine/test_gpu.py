"""The same plans on a CUDA device; run with: pytest -m gpu."""

import numpy as np
import pytest
import torch

from drift_merge.engine.job import RunOptions
from drift_merge.maths.compression import LARGEST, compress_rows, decompress_rows
from drift_merge.merges.make import make_merge
from drift_merge.plans.prepare import prepare
from drift_merge.priors.compute import compute_prior
from drift_merge.recipes.recipe import Recipe
from tests import checkpoints as c

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def made_on(device, pair, out, **values):
    recipe = Recipe(reasoners=(str(pair.reasoner),), mllm=str(pair.mllm), **values)
    prepared = prepare(recipe, quiet=True)
    make = compute_prior if recipe.method == "prior" else make_merge
    make(prepared, prepared.plan(), out, RunOptions(threads=2, device=device))
    return c.read_tensors(out)


def test_delta_has_the_same_bytes_on_both_devices(tmp_path):
    pair = c.make_pair(tmp_path)
    values = {"method": "prior", "dtype": "bfloat16"}
    on_cpu = made_on("cpu", pair, tmp_path / "cpu", **values)
    assert made_on("cuda", pair, tmp_path / "gpu", **values) == on_cpu


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn"])
def test_codes_and_scales_have_the_same_bytes_on_both_devices(tmp_path, dtype):
    pair = c.make_pair(tmp_path)
    values = {"method": "prior", "dtype": dtype}
    on_cpu = made_on("cpu", pair, tmp_path / "cpu", **values)
    assert made_on("cuda", pair, tmp_path / "gpu", **values) == on_cpu


@pytest.mark.parametrize("dtype", LARGEST)
def test_rows_of_any_size_of_numbers_have_the_same_codes_on_both_devices(dtype):
    torch.manual_seed(0)
    rows = torch.randn(200, 257) * torch.logspace(-44, 38, 200)[:, None]
    rows.clamp_(-3e38, 3e38)
    codes, scales = compress_rows(rows, dtype)
    found = compress_rows(rows.cuda(), dtype)
    assert torch.equal(found[0].cpu().view(torch.uint8), codes.view(torch.uint8))
    assert torch.equal(found[1].cpu(), scales)
    back = decompress_rows(codes, scales)
    assert torch.equal(decompress_rows(*found).cpu(), back)
    assert torch.equal(decompress_rows(codes, scales, torch.empty_like(rows.cuda())).cpu(), back)


@pytest.mark.parametrize("method", ["linear", "slerp", "nearswap"])
def test_merges_agree_within_the_rounding_of_float32(tmp_path, method):
    pair = c.make_pair(tmp_path)
    values = {"method": method, "dtype": "float32", "modules": "attn,mlp,norm"}
    on_cpu = made_on("cpu", pair, tmp_path / "cpu", **values)
    on_gpu = made_on("cuda", pair, tmp_path / "gpu", **values)
    for name, tensor in on_cpu.items():
        # A fused multiply-add rounds once where the CPU rounds twice; sums may differ in order.
        bound = 2.0**-20 * max(1.0, float(np.abs(tensor.values).max()))
        assert np.abs(on_gpu[name].values - tensor.values).max(initial=0.0) <= bound
