"""The GPU's kernels: in Triton's interpreter on tensors of the CPU, and compiled for sm_90.

Triton decides at its import whether it interprets, so that happens in processes of their own.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from drift_merge.training.inject.kernels.runs import Run
from tests.training.inject.kernel_cases import CASES, COEFFICIENTS, check, check_handle, runs_of
from tests.training.toys import make_toy

ROOT = Path(__file__).parents[3]
IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)
interpreter = pytest.mark.skipif(not IS_INTERPRETED, reason="runs in the process of another test")


@pytest.mark.slow
@pytest.mark.skipif(IS_INTERPRETED, reason="it is this process")
def test_in_the_interpreter():
    words = ("-m", "pytest", "-n", "0", "-q", "-m", "", "-p", "no:randomly", __file__)
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, *words], env=environment, cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert "passed" in done.stdout


@pytest.fixture(scope="module")
def interpreted():
    from drift_merge.training.inject.kernels.triton_kernels import TritonKernels

    return TritonKernels()


@interpreter
@pytest.mark.parametrize(
    ("gradient", "delta", "scaling"),
    [case for case in CASES if case[1] != torch.float8_e4m3fn],  # not in the interpreter
)
def test_triton_kernels_do_what_the_loop_does(interpreted, gradient, delta, scaling):
    check(interpreted, gradient, delta, scaling, is_exact=gradient == torch.float32)


@interpreter
def test_triton_sees_gradients_that_have_moved(interpreted):
    for _ in range(2):
        runs, _ = runs_of(torch.float32, torch.float32, "none")
        moved = [
            Run(run.slot, run.gradient.clone(), run.delta, run.whole) for run in runs
        ]  # as zero_grad and backward make them anew
        before = [run.gradient.clone() for run in moved]
        for used in (runs, moved):
            sums = torch.zeros(4, 3, dtype=torch.float64)
            interpreted.sums(used, sums)
            assert torch.equal(sums[2, 0], sums[2, 0])
        interpreted.bias(moved, COEFFICIENTS)
        for run, old in zip(moved, before, strict=True):
            assert run.numel == 0 or not torch.equal(run.gradient, old)


@interpreter
@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
@pytest.mark.parametrize("rule", ["absolute", "adaptive_cosine"])
def test_a_handle_trains_the_same_with_triton(interpreted, tmp_path, monkeypatch, rule, dtype):
    check_handle(make_toy(tmp_path, dtype=dtype), rule, monkeypatch, interpreted)


CUBINS = """
import re
import triton.language as tl, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from drift_merge.training.inject.kernels import triton_kernels as t

def compiled(kernel, pointers, constants):
    signature = pointers | dict.fromkeys(constants, "constexpr")
    places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn=kernel, signature=signature, constexprs=places)
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 8})
    return made.asm

tables = {"gradients": "*i64", "table": "*i64", "blocks": "*i64"}
for delta, scaling in ((tl.bfloat16, 0), (tl.int8, 1), (tl.float8e4nv, 2)):
    constants = {"G": tl.bfloat16, "D": delta, "SCALING": scaling, "N": t.BLOCK, "ALIGNED": True}
    for kernel, more in ((t.sums_kernel, "partial"), (t.bias_kernel, "coefficients")):
        found = compiled(kernel, tables | {more: "*fp64"}, constants)
        assert len(found["cubin"]) > 1000
        assert "ld.global.v4.b32" in found["ptx"], "16 bytes are loaded at once"
pointers = {"partial": "*fp64", "ranges": "*i64", "into": "*fp64", "columns": "i32"}
assert "atom" not in compiled(t.reduce_kernel, pointers, {"N": t._STEP})["ptx"]
"""


@pytest.mark.slow
@pytest.mark.skipif(IS_INTERPRETED, reason="nothing is compiled in the interpreter")
def test_triton_kernels_compile_for_an_h100(tmp_path):
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    subprocess.run([sys.executable, "-c", CUBINS], check=True, env=environment, cwd=ROOT)
