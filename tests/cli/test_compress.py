"""`drift-prior compress`, and compressed priors in the other commands."""

import json

import pytest

from tests import checkpoints as c

DTYPES = ("int8", "float8_e4m3fn")


@pytest.fixture
def models(tmp_path, monkeypatch):
    """A directory with `reasoner`, `mllm` and `prior` in it; the current one."""
    pair = c.make_pair(tmp_path, mllm_sidecars=c.SIDECARS)
    monkeypatch.chdir(tmp_path)
    from tests.runs import run_prior

    run_prior(pair.reasoner.relative_to(tmp_path), pair.mllm.relative_to(tmp_path),
              tmp_path / "prior")  # fmt: skip
    return tmp_path


def compress(call, *flags):
    return call("drift-prior", "compress", "prior", *flags)


@pytest.mark.parametrize("dtype", DTYPES)
def test_sizes_cosines_and_the_path_are_printed(call, models, dtype):
    result = compress(call, "--dtype", dtype, "-o", "out")
    assert result.code == 0
    first, second, *_, last = result.out.splitlines()
    assert first == f"bfloat16 7.8 kB -> {dtype} 4.9 kB (62%)"
    assert second.startswith("Compressed: cosine of delta and its stored form 0.999")
    assert last == "out"
    assert "Next: drift-prior verify out" in result.err
    assert call("drift-prior", "verify", "out").code == 0
    assert not (models / "out.partial").exists()


def test_quiet_prints_only_the_path_and_json_one_object(call, models):
    assert compress(call, "--dtype", "int8", "-o", "out", "-q") == (0, "out\n", "")
    result = compress(call, "--dtype", "int8", "-o", "out", "--overwrite", "--json")
    assert (result.code, result.err) == (0, "")
    manifest = json.loads((models / "out/prior.json").read_text())
    del manifest["tensors"]
    assert result.json == {"schema": 1, "output": "out", **manifest}


def test_a_dry_run_prints_the_plan_and_writes_nothing(call, models):
    people = compress(call, "--dtype", "int8", "-o", "out", "-n", "-v")
    assert people.code == 0
    assert "Nothing was written" in people.err
    assert "Tensors   20 cast" in people.out
    machine = compress(call, "--dtype", "int8", "-o", "out", "-n", "-v", "--json").json
    assert machine["dry_run"] is True
    assert {step["dtype"] for step in machine["steps"]} == {"I8", "BF16"}
    assert not (models / "out").exists()


def test_progress_reaches_100_percent(call, models, monkeypatch):
    from drift_merge.cli import progress

    monkeypatch.setattr(progress, "SHOWN_BYTES", 0)
    result = compress(call, "--dtype", "int8", "-o", "out", "--threads", 2)
    assert [x for x in result.err.splitlines() if x.startswith("Streaming: 100% of ")]


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        (("-o", "out"), 2, "--dtype"),
        (("--dtype", "int8"), 2, "-o"),
        (("--dtype", "bfloat16", "-o", "out"), 2, "bfloat16"),
        (("--dtype", "int8", "-o", "prior/out"), 6, "is inside the input"),
        (("--dtype", "int8", "-o", "prior", "--overwrite"), 6, "is the input"),
        (("--dtype", "int8", "-o", "mllm"), 6, "exists already"),
        (("--dtype", "int8", "-o", "out", "--max-shard-size", "many"), 2, "not a size"),
        (("--dtype", "int8", "-o", "out", "--device", "cuda:99"), 2, "CUDA"),
    ],
)
def test_errors_have_their_exit_code_and_leave_nothing(call, models, flags, code, message):
    before = {path.name for path in models.iterdir()}
    result = compress(call, *flags)
    assert (result.code, result.out) == (code, "")
    assert message in result.err
    assert "Traceback" not in result.err
    assert {path.name for path in models.iterdir()} == before


def test_a_directory_that_is_no_prior_and_one_that_is_compressed_are_refused(call, models):
    result = call("drift-prior", "compress", "mllm", "--dtype", "int8", "-o", "out")
    assert result.code == 3
    assert compress(call, "--dtype", "int8", "-o", "small").code == 0
    result = call("drift-prior", "compress", "small", "--dtype", "float8_e4m3fn", "-o", "out")
    assert result.code == 2
    assert "compressed already (int8)" in result.err
    assert not (models / "out").exists()


@pytest.mark.parametrize("dtype", DTYPES)
def test_inspect_and_apply_take_a_compressed_prior(call, models, dtype):
    made = call("drift-prior", "compute", "reasoner", "mllm", "--dtype", dtype, "-o", "small")
    assert "Compressed: cosine" in made.out
    shown = call("drift-prior", "inspect", "small")
    assert shown.code == 0
    assert f"({dtype})" in shown.out
    assert "Compressed: cosine" in shown.out
    assert "20 tensors, 4.9 kB" in shown.out
    checked = call("drift-prior", "verify", "small", "--reasoner", "reasoner", "--mllm", "mllm")
    assert checked.code == 0
    assert "OK: 20 tensors" in checked.out
    applied = call("drift-prior", "apply", "small", "mllm", "--scale", "0.3", "-o", "merged")
    assert applied.code == 0, applied.err
    assert call("drift-merge", "verify", "merged").code == 0


def test_its_manifest_makes_the_same_tensors_again(call, models):
    assert compress(call, "--dtype", "int8", "-o", "small").code == 0
    again = call("drift-merge", "run", "small", "-o", "again")
    assert again.code == 0, again.err
    assert c.read_tensors(models / "again") == c.read_tensors(models / "small")
    config = ("--config", "small/prior.json", "-o", "third")
    assert call("drift-prior", "compute", *config).code == 0
    assert c.read_tensors(models / "third") == c.read_tensors(models / "small")


def test_a_printed_call_keeps_dtype_and_through(call, models):
    flags = ("--dtype", "int8", "--through", "bfloat16", "-o", "out")
    printed = call("drift-prior", "compute", "reasoner", "mllm", *flags, "--print-config")
    assert "dtype: int8\nthrough: bfloat16\n" in printed.out
    (models / "recipe.yaml").write_text(printed.out)
    assert call("drift-merge", "run", "recipe.yaml", "--dtype", "float8_e4m3fn").code == 0
    manifest = json.loads((models / "out/prior.json").read_text())
    assert manifest["parameters"]["dtype"] == "float8_e4m3fn"
    assert manifest["parameters"]["through"] == "bfloat16"
