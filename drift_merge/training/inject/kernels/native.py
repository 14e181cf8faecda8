"""The CPU's kernels: compiled once where there is a C++ compiler, and kept in the user's cache.

Never required: without a compiler, or where it fails, the loop does the same. Two threads work on
the same blocks in both passes, so that the second finds gradient and delta in their caches.
"""

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from drift_merge.maths.compression import float8_table
from drift_merge.training.inject.kernels.runs import DELTAS, GRADIENTS, Run
from drift_merge.training.inject.kernels.source import CODE

_COMPILERS = ("c++", "g++", "clang++")  # CXX comes first
_PLAIN = ("-O3", "-std=c++17", "-fPIC", "-ffp-contract=off")
_WIDE = ("-mprefer-vector-width=512",) if platform.machine() in ("x86_64", "AMD64") else ()
_BEST = ("-march=native", *_WIDE, "-fopenmp")
_SECONDS = 120  # after which a compiler is given up
_log = logging.getLogger(__name__)


class NativeKernels:
    """Both passes in C++."""

    name = "native"

    def __init__(self, library: Any) -> None:
        self._library = library
        self._float8 = float8_table()

    def sums(self, runs: list[Run], into: Tensor) -> None:
        """As `Kernels.sums`."""
        for table, kind in _tables(runs):
            columns = ctypes.c_int64(into.stride(0))
            self._library.drift_merge_sums(*self._arguments(table, kind), _pointer(into), columns)

    def bias(self, runs: list[Run], coefficients: Tensor) -> None:
        """As `Kernels.bias`."""
        values = coefficients.contiguous()
        for table, kind in _tables(runs):
            self._library.drift_merge_bias(*self._arguments(table, kind), _pointer(values))

    def _arguments(self, table: Tensor, kind: tuple[int, int]) -> tuple[Any, ...]:
        num_runs = ctypes.c_int64(len(table))
        float8 = _pointer(self._float8)
        return _pointer(table), num_runs, *kind, float8, torch.get_num_threads()


def _tables(runs: list[Run]) -> Iterator[tuple[Tensor, tuple[int, int]]]:
    """Rows of `Run` in C++, and their dtypes, for neighbors of the same dtypes."""
    for kind, same in groupby((run for run in runs if run.numel), _kind):
        rows = [
            (
                run.gradient.data_ptr(),
                run.delta.elements.data_ptr(),
                0 if run.delta.scales is None else run.delta.scales.data_ptr(),
                *(run.numel, run.delta.first, run.delta.width, run.delta.is_by_column, run.slot),
            )
            for run in same
        ]
        yield torch.tensor(rows, dtype=torch.int64), kind


def _kind(run: Run) -> tuple[int, int]:
    return GRADIENTS.index(run.gradient.dtype), DELTAS.index(run.delta.elements.dtype)


def _pointer(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


@cache
def native_kernels() -> NativeKernels | None:
    """The compiled kernels, from the cache or anew; None where they cannot be had."""
    compiler = next(
        (found for name in (os.environ.get("CXX"), *_COMPILERS) if (found := _which(name))), None
    )
    if compiler is None:
        return None
    try:
        return NativeKernels(ctypes.CDLL(str(_library(compiler))))
    except (OSError, subprocess.SubprocessError) as error:
        _log.info("the kernels of the CPU could not be compiled, the loop is used: %s", error)
        return None


def _which(name: str | None) -> str | None:
    return shutil.which(name) if name else None


def cache_directory() -> Path:
    """Where compiled kernels are kept: XDG_CACHE_HOME, or ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "drift_merge"


def _library(compiler: str) -> Path:
    """The shared library for this code, compiler and processor; compiled if it is not there.

    Raises:
        OSError, SubprocessError: it cannot be compiled or written.
    """
    version = subprocess.run(
        [compiler, "--version"], capture_output=True, check=True, timeout=_SECONDS
    ).stdout
    seal = hashlib.sha256(b"\0".join([CODE.encode(), version, _processor().encode()])).hexdigest()
    directory = cache_directory()
    path = directory / f"kernels-{seal[:32]}.so"
    if path.is_file() and path.stat().st_uid == os.getuid():
        return path
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory) as folder:
        made = _compile(compiler, Path(folder))
        os.replace(made, path)  # whole at once: other ranks may look for it
    return path


def _compile(compiler: str, folder: Path) -> Path:
    """Compile with all this processor has, or plainly where the compiler does not know that."""
    code, unlinked, made = (folder / name for name in ("kernels.cpp", "kernels.o", "kernels.so"))
    code.write_text(CODE)
    # torch's own OpenMP is taken where it is visible: a second one would fight for the cores.
    is_shared = hasattr(ctypes.CDLL(None), "GOMP_parallel")
    for flags in ((*_PLAIN, *_BEST), _PLAIN):
        links = [] if is_shared or "-fopenmp" not in flags else ["-fopenmp"]
        try:
            _run(compiler, *flags, "-c", str(code), "-o", str(unlinked))
            _run(compiler, "-shared", *links, str(unlinked), "-o", str(made))
            return made
        except subprocess.CalledProcessError as error:
            failed = error
    raise failed


def _run(*words: str) -> None:
    subprocess.run(words, capture_output=True, check=True, timeout=_SECONDS)


def _processor() -> str:
    """What -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()} {platform.node()}"
    return "\n".join(sorted({line for line in lines if line.startswith(("flags", "Features"))}))
