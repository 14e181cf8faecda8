"""Kernels and the loop: equal biases bit for bit, sums within float32's rounding of blocks."""

import pytest
import torch

import drift_merge
from drift_merge.training.inject.kernels import choose, native
from tests.training.inject.kernel_cases import CASES, check, check_handle, runs_of
from tests.training.toys import make_toy


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """The CPU's kernels, compiled quickly: -O1 takes half the time and gives the same bits."""
    patch = pytest.MonkeyPatch()
    patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    patch.setattr(native, "_PLAIN", ("-O1", *native._PLAIN[1:]))
    native.native_kernels.cache_clear()
    found = native.native_kernels()
    if found is None:
        pytest.skip("no C++ compiler")
    yield found
    native.native_kernels.cache_clear()
    patch.undo()


@pytest.mark.parametrize(("gradient", "delta", "scaling"), CASES)
def test_native_kernels_do_what_the_loop_does(compiled, gradient, delta, scaling):
    check(compiled, gradient, delta, scaling, is_exact=True)


@pytest.mark.slow
def test_native_kernels_as_users_get_them(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    native.native_kernels.cache_clear()
    found = native.native_kernels()
    assert found is not None
    for case in CASES:
        check(found, *case, is_exact=True)
    native.native_kernels.cache_clear()
    assert native.native_kernels() is not None  # from the cache
    assert len(list(tmp_path.rglob("*.so"))) == 1
    native.native_kernels.cache_clear()


def test_sums_do_not_depend_on_the_number_of_threads(compiled):
    found = []
    before = torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        runs, _ = runs_of(torch.float32, torch.bfloat16, "none")
        found.append(torch.zeros(4, 3, dtype=torch.float64))
        compiled.sums(runs, found[-1])
    torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    return {
        dtype: make_toy(tmp_path_factory.mktemp(dtype), dtype=dtype)
        for dtype in ("bfloat16", "int8")
    }


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
@pytest.mark.parametrize("rule", ["absolute", "adaptive_cosine"])
def test_a_handle_trains_the_same_with_kernels(compiled, stored, monkeypatch, rule, dtype):
    check_handle(stored[dtype], rule, monkeypatch, compiled)


def test_without_a_compiler_or_with_a_broken_one_the_loop_is_used(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    native.native_kernels.cache_clear()
    monkeypatch.setattr(native.shutil, "which", lambda name: None)
    assert native.native_kernels() is None
    native.native_kernels.cache_clear()
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\nexit 3\n")
    broken.chmod(0o755)
    monkeypatch.setattr(native.shutil, "which", lambda name: str(broken))
    assert native.native_kernels() is None
    assert not (tmp_path / "cache").exists()
    native.native_kernels.cache_clear()


def test_the_variable_chooses_and_small_models_wait_for_no_compiler(monkeypatch):
    asked = []
    monkeypatch.setattr(choose, "native_kernels", lambda: asked.append(1))
    cpu = torch.device("cpu")
    monkeypatch.delenv(choose.VARIABLE, raising=False)
    assert choose._kernels(cpu, 1000) is None
    assert not asked
    choose._kernels(cpu, 10**9)
    monkeypatch.setenv(choose.VARIABLE, "native")
    choose._kernels(cpu, 1000)
    assert len(asked) == 2
    monkeypatch.setenv(choose.VARIABLE, "loop")
    choose._kernels(cpu, 10**9)
    assert len(asked) == 2
    monkeypatch.setenv(choose.VARIABLE, "cuda")
    with pytest.raises(drift_merge.DriftMergeError, match="auto, native, loop"):
        choose._kernels(cpu, 1)
