"""Record what fusion-bench gives on small matrices; run once, in an environment of its own.

    python -m venv golden-venv && golden-venv/bin/pip install fusion-bench==0.2.33
    golden-venv/bin/python tests/golden/methods/record_fusion_bench.py

The package is called, none of its code is here. Writes fusion_bench.json beside this file.
"""

import importlib.metadata
import json
from pathlib import Path

import torch
from fusion_bench.method.isotropic_merging.iso_utils import iso_c, iso_cts
from fusion_bench.method.magmax import magmax_merge
from fusion_bench.method.singular_value_calibration.utils import (
    subspace_consistency_spectral_calibration_accelerated as svc,
)
from fusion_bench.method.task_singular_vector.utils import TSVM_utils
from fusion_bench.method.wudi.wudi import wudi_merging
from torch import Tensor

HERE = Path(__file__).parent
SHAPE = (12, 8)


def taus(count: int) -> list[Tensor]:
    """Task vectors (12, 8), float64, the same on every run."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(SHAPE, generator=generator, dtype=torch.float64) for _ in range(count)]


def layer(weight: Tensor) -> torch.nn.Linear:
    """A module with this weight, which magmax wants."""
    found = torch.nn.Linear(SHAPE[1], SHAPE[0], bias=False, dtype=torch.float64)
    found.weight.data.copy_(weight)
    return found


def record() -> list[dict[str, object]]:
    """The merged task vector of every method, for two and three models."""
    cases: list[dict[str, object]] = []
    for count in (2, 3):
        own = [{"w": tau} for tau in taus(count)]
        zero = torch.zeros(SHAPE, dtype=torch.float64)
        total = torch.stack(taus(count)).sum(0)
        found = {
            "iso-c": iso_c(own, accelerator="cpu")["w"],
            "iso-cts": iso_cts(own, common_space_fraction=0.8, accelerator="cpu")["w"],
            "tsv-m": TSVM_utils.compute_and_sum_svd_mem_reduction(own, accelerator="cpu")["w"],
            "svc": svc(zero, taus(count), total, alpha=0.1, accelerator=torch.device("cpu")),
            "magmax": magmax_merge(layer(zero), list(map(layer, taus(count))), 0.5).weight,
        }
        wudi = wudi_merging(own, accelerator="cpu", iter_num=300, exclude_keys=[])
        found["wudi"] = wudi["w"]
        for name, result in found.items():
            values = result.detach().flatten().tolist()
            cases.append({"method": name, "models": count, "result": values})
    return cases


if __name__ == "__main__":
    names = ("fusion-bench", "torch")
    versions = {name: importlib.metadata.version(name) for name in names}
    inputs = [tau.flatten().tolist() for tau in taus(3)]
    whole = {"versions": versions, "shape": SHAPE, "taus": inputs, "cases": record()}
    (HERE / "fusion_bench.json").write_text(json.dumps(whole) + "\n")
