"""NaN, Inf, overflow, odd shapes and quantized codes, through the real command line."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.checkpoints import (
    HIDDEN,
    Stored,
    make_pair,
    read_tensors,
    shard_bytes,
    store,
    text_shapes,
)
from tests.faults.harness import command, refused, run
from tests.faults.inputs.damage import (
    ROLES,
    K,
    Q,
    header_of,
)

# Values that are no numbers.


def poisoned(name: str, count: int, value: float, dtype: str = "BF16") -> dict[str, Stored]:
    values = np.ones((text_shapes(1) | {"visual.merger.mlp.2.weight": (HIDDEN, 32)})[name])
    values.reshape(-1)[:count] = value
    return {name: store(values, dtype)}


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32", "F64"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("name", ["compute", "linear"])
def test_nan_and_inf_are_named_and_counted(
    name: str, role: str, value: float, dtype: str, tmp_path: Path
) -> None:
    pair = make_pair(tmp_path, layers=1, **{role: poisoned(Q, 3, value, dtype)})  # type: ignore[arg-type]
    refused(command(name, pair, tmp_path / "out"), 5, f"{role}: {Q}: 3 values", "--allow-nonfinite")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("options", [(), ("--dtype", "float32"), ("--dtype", "float16")])
def test_nan_and_inf_in_a_copied_tensor_are_counted_and_kept(
    value: float, options: tuple[str, ...], tmp_path: Path
) -> None:
    """Clip bounds that were never set are infinite; a cast to another dtype keeps them so."""
    name = "visual.merger.mlp.2.weight"
    bound = store(np.array(value))  # of no dimension
    pair = make_pair(tmp_path, layers=1, mllm={**poisoned(name, 2, value), "visual.bound": bound})
    out = tmp_path / "out"
    result = run(*command("linear", pair, out), *options)
    assert result.code == 0, result
    assert "Note [nonfinite]: 3 values of 2 tensors" in result.stderr
    tensors = json.loads((out / "drift_merge.json").read_text())["tensors"]
    counted = {n: entry["nonfinite"] for n, entry in tensors.items() if "nonfinite" in entry}
    assert counted == {name: {f"mllm: {name}": 2}, "visual.bound": {"mllm: visual.bound": 1}}
    written = read_tensors(out)
    assert np.array_equal(written["visual.bound"].values, np.array(value), equal_nan=True)
    assert run("drift-merge", "verify", str(out)).code == 0


def test_a_cast_that_overflows_beside_an_infinity_is_refused(tmp_path: Path) -> None:
    name = "visual.merger.mlp.2.weight"
    values = poisoned(name, 2, float("inf"))[name].values.copy()
    values.flat[5] = 1e30  # more than float16 can hold
    pair = make_pair(tmp_path, layers=1, mllm={name: store(values)})
    arguments = [*command("linear", pair, tmp_path / "out"), "--dtype", "float16"]
    refused(arguments, 5, f"the result in F16: {name}: 1 values")


def test_a_float8_nan_in_a_copied_tensor_is_counted_and_kept(tmp_path: Path) -> None:
    name = "visual.scale"
    codes = Stored("F8_E4M3", (4,), b"\x7f\x38\xff\x00")  # NaN, 1, NaN, 0
    pair = make_pair(tmp_path, layers=1, mllm={name: codes})
    out = tmp_path / "out"
    assert run(*command("linear", pair, out)).code == 0
    entry = json.loads((out / "drift_merge.json").read_text())["tensors"][name]
    assert entry["nonfinite"] == {f"mllm: {name}": 2}
    assert read_tensors(out)[name] == codes


def test_nan_where_it_is_not_read_is_no_concern_of_a_prior(tmp_path: Path) -> None:
    name = "visual.merger.mlp.2.weight"
    pair = make_pair(tmp_path, layers=1, mllm=poisoned(name, 2, float("nan")))
    assert run(*command("compute", pair, tmp_path / "out")).code == 0


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("name", ["compute", "linear"])
def test_nan_is_accepted_on_request_and_counted_in_the_manifest(
    name: str, role: str, tmp_path: Path
) -> None:
    poison: Any = {role: poisoned(Q, 3, float("nan")) | poisoned(K, 1, float("inf"))}
    pair = make_pair(tmp_path, layers=1, **poison)
    out = tmp_path / "out"
    result = run(*command(name, pair, out), "--allow-nonfinite")
    assert result.code == 0, result
    file = "prior.json" if name == "compute" else "drift_merge.json"
    tensors = json.loads((out / file).read_text())["tensors"]
    counted = {n: entry["nonfinite"] for n, entry in tensors.items() if "nonfinite" in entry}
    cut = "model." if name == "compute" else ""
    assert counted == {
        Q.removeprefix(cut): {f"{role}: {Q}": 3},
        K.removeprefix(cut): {f"{role}: {K}": 1},
    }
    written = read_tensors(out)[Q.removeprefix(cut)].values
    assert int(np.isnan(written).sum()) == 3
    assert run(command(name, pair, out)[0], "verify", str(out)).code == 0


@pytest.mark.parametrize(
    ("stored", "value", "dtype"),
    [
        ("F32", 1e5, "float16"),
        ("F32", 3.4e38, "bfloat16"),
        ("F64", 1e300, "float32"),
        ("F64", 1e300, "bfloat16"),
    ],
)
@pytest.mark.parametrize("name", ["compute", "linear"])
def test_a_value_that_the_output_dtype_cannot_hold_is_refused(
    name: str, stored: str, value: float, dtype: str, tmp_path: Path
) -> None:
    big: Any = {"reasoner": poisoned(Q, 3, value, stored), "mllm": poisoned(Q, 3, value, stored)}
    if name == "compute":
        big["mllm"] = poisoned(Q, 3, -value, stored) if value < 3e38 else poisoned(Q, 0, 0, stored)
    pair = make_pair(tmp_path, layers=1, **big)
    arguments = [*command(name, pair, tmp_path / "out"), "--dtype", dtype]
    refused(arguments, 5, "the result in", Q.removeprefix("model."), "3 values", "--dtype float32")


# Shapes and dtypes at the edge.


def test_empty_tensors_and_scalars_pass_through(tmp_path: Path) -> None:
    extra = {
        "visual.empty": store(np.zeros((0, 5))),
        "visual.scalar": store(np.float32(1.5)),
        "visual.flags": store(np.array([True, False]), "BOOL"),
        "visual.count": store(np.array(7), "I64"),
        "model.layers.0.mlp.gate_proj.bias": store(np.zeros((0,))),
        "model.layers.0.mlp.up_proj.bias": store(np.float32(0.25)),
    }
    tower = {name: tensor for name, tensor in extra.items() if name.startswith("model.")}
    pair = make_pair(tmp_path, layers=1, mllm=extra, reasoner=tower)
    for name in ("compute", "linear"):
        out = tmp_path / name
        result = run(*command(name, pair, out))
        assert result.code == 0, result
        assert run(command(name, pair, out)[0], "verify", str(out)).code == 0
    written = read_tensors(tmp_path / "linear")
    assert {name: written[name] for name in extra} == extra
    assert read_tensors(tmp_path / "compute")["layers.0.mlp.up_proj.bias"].values == 0


def test_data_at_odd_offsets_gives_the_same_result(tmp_path: Path) -> None:
    pair = make_pair(tmp_path / "even", layers=1)
    odd = make_pair(tmp_path / "odd", layers=1)
    for directory in odd:
        header, data = header_of(directory / "model.safetensors")
        text = json.dumps(header).encode()
        text += b" " * (1 - len(text) % 2)
        (directory / "model.safetensors").write_bytes(shard_bytes(text, data))
        assert (len(text) + 8) % 2 == 1
    for number, some in enumerate((pair, odd)):
        for name in ("compute", "linear"):
            assert run(*command(name, some, tmp_path / f"{name}{number}")).code == 0
    for name in ("compute", "linear"):
        assert read_tensors(tmp_path / f"{name}0") == read_tensors(tmp_path / f"{name}1")


# Quantized inputs: codes are no numbers.

CODES = Stored("U8", (HIDDEN, HIDDEN), bytes(HIDDEN * HIDDEN))
QUANTIZED: dict[str, tuple[dict[str, Stored | None], dict[str, Any], str]] = {
    "named by its config": ({}, {"quantization_config": {"quant_method": "gptq"}}, "gptq"),
    "named by its text config": (
        {},
        {"text_config": {"quantization_config": {"quant_method": "awq"}}},
        "awq",
    ),
    "int8 codes": ({Q: CODES._replace(dtype="I8")}, {}, Q),
    "uint8 codes": ({Q: CODES}, {}, Q),
    "float8": ({Q: CODES._replace(dtype="F8_E4M3")}, {}, Q),
    "scales beside a weight": (
        {Q.replace(".weight", ".weight_scale"): store(np.ones(HIDDEN))},
        {},
        "q_proj.weight_scale",
    ),
    "GPTQ names": (
        {
            Q: None,
            Q.replace(".weight", ".qweight"): Stored("I32", (2, HIDDEN), bytes(8 * HIDDEN)),
            Q.replace(".weight", ".scales"): store(np.ones((1, HIDDEN)), "F16"),
        },
        {},
        "q_proj.qweight",
    ),
    "bitsandbytes shapes": (
        {
            Q: Stored("U8", (HIDDEN * HIDDEN // 2, 1), bytes(HIDDEN * HIDDEN // 2)),
            f"{Q}.absmax": store(np.ones(4), "F32"),
        },
        {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
        "bitsandbytes",
    ),
}


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("form", QUANTIZED)
@pytest.mark.parametrize("name", ["compute", "linear"])
def test_a_quantized_input_is_refused_by_name(
    name: str, form: str, role: str, tmp_path: Path
) -> None:
    tensors, settings, mention = QUANTIZED[form]
    key = "reasoner_config" if role == "reasoner" else "mllm_config_changes"
    changes: Any = {role: tensors, key: settings}
    pair = make_pair(tmp_path, layers=1, **changes)
    given = str(getattr(pair, role))
    refused(command(name, pair, tmp_path / "out"), 5, f"{given} is quantized", mention)
