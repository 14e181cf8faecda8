"""Variants `mergekit` and `peft` against numbers that these packages gave on the same tensors.

The numbers were recorded once, with the versions, by tests/golden/methods/record.py. Random masks
are not compared: both sides get the same chances, and what is made of them is compared. The
tensors hold no two equal magnitudes, among which a sort may choose as it likes.
"""

import json
from pathlib import Path

import pytest
import torch

from drift_merge.maths.methods import METHODS, dropping
from tests.maths.methods.driver import merge

FOLDER = Path(__file__).parents[2] / "golden" / "methods"
RECORDS = {name: json.loads((FOLDER / f"{name}.json").read_text()) for name in ("mergekit", "peft")}
CASES = [(package, case) for package, record in RECORDS.items() for case in record["cases"]]
RANDOM = ("dare-linear", "dare-ties", "della", "della-linear")


def label(value):
    if isinstance(value, str):
        return value
    options = ",".join(f"{k}={v}" for k, v in value["options"].items())
    return f"{value['method']}-{value['inputs']}-{options}"


def inputs_of(package):
    record = RECORDS[package]
    return {k: torch.tensor(v).reshape(record["shape"]) for k, v in record["inputs"].items()}


def ours(package, case):
    inputs = inputs_of(package)
    kind = case["inputs"]
    reasoners = [inputs["first"]] + ([inputs["second"]] if kind in ("base", "free3") else [])
    options = {"variant": package} | case["options"]
    theirs = case["theirs"][1]
    if "weight" in theirs:
        options |= {"mllm_weight": theirs["weight"][0], "weights": theirs["weight"][1:]}
    base = inputs["base"] if kind.startswith("base") else None
    return merge(case["method"], inputs["mllm"], reasoners, base, **options)


def same(found, case):
    exact = torch.tensor(case["result"], dtype=torch.float64)
    # Some 20 roundings of float32 numbers up to 4, more where an angle is divided by.
    return torch.allclose(found.double().flatten(), exact, rtol=0.0, atol=2e-5)


@pytest.mark.parametrize(
    ("package", "case"), [pair for pair in CASES if pair[1]["method"] not in RANDOM], ids=label
)
def test_a_deterministic_variant_gives_the_numbers_of_its_package(package, case):
    assert same(ours(package, case), case)


@pytest.mark.parametrize(
    ("package", "case"), [pair for pair in CASES if pair[1]["method"] in RANDOM], ids=label
)
def test_with_the_same_chances_a_random_variant_gives_the_numbers_of_its_package(
    package, case, monkeypatch
):
    chances = [inputs_of(package)[f"chances{stream}"].flatten() for stream in range(3)]

    def chance(key, begin, like):
        return chances[key][begin : begin + like.numel()].to(like.dtype, copy=True)

    monkeypatch.setattr(dropping, "mixed_key", lambda key, stream: stream)
    monkeypatch.setattr(dropping, "uniform", chance)
    monkeypatch.setattr(
        dropping,
        "keep_mask",
        lambda key, begin, density, like: (chance(key, begin, like) < density).to(like.dtype),
    )
    assert same(ours(package, case), case)


def test_the_records_name_their_versions_and_cover_every_variant():
    assert RECORDS["mergekit"]["versions"]["mergekit"] == "0.1.5"
    for package, record in RECORDS.items():
        assert record["versions"].keys() == {package, "torch"}
        recorded = {case["method"] for case in record["cases"]}
        with_variant = {n for n, method in METHODS.items() if package in method.variants}
        # mergekit has had RAM since January 2026 only, after 0.1.5.
        assert with_variant - {"ram-plus"} <= recorded


def test_peft_and_mergekit_disagree_on_the_same_tensors_and_call_both_ties():
    tau = {"mllm": torch.tensor([2.0]), "first": torch.tensor([-1.0])}
    zero = torch.zeros(1)
    found = {
        variant: float(
            merge(
                "ties",
                tau["mllm"],
                [tau["first"]],
                zero,
                variant=variant,
                density=1.0,
                mllm_weight=0.25,
                weights=[1.0],
            )
        )
        for variant in ("paper", "mergekit", "peft")
    }
    # Weighted: 0.5 - 1.0 < 0 elects the reasoner, 1.0 * -1.0 / 1.0. Unweighted: 2 - 1 > 0 elects
    # the mllm, and 0.25 * 2 is divided by the count of 1.
    assert found == {"paper": -1.0, "mergekit": -1.0, "peft": 0.5}
