"""What torch and safetensors say of a disk without room becomes an OutputError: exit code 6."""

import errno
import os
import signal
import sys
from contextlib import contextmanager

import pytest
import torch
from safetensors.torch import save_file

from drift_merge.errors import OutputError, RecipeError
from drift_merge.trainers.sft.disk import full_disk_named

WEIGHTS = {"weights": torch.ones(100_000)}


@contextmanager
def small_files():
    """No file may grow beyond 4 kB: as a full disk, for this process alone; it is put back."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


WRITERS = {
    "torch": lambda path: torch.save(WEIGHTS, path),
    "safetensors": lambda path: save_file(WEIGHTS, path),
    "python": lambda path: path.write_bytes(bytes(5000)),
}


@pytest.mark.skipif(sys.platform == "win32", reason="limits the size of a file")
@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("is_kept", [True, False])
def test_a_disk_without_room_is_named_with_the_way_on(tmp_path, name, is_kept):
    run = tmp_path / "out.run"
    if is_kept:
        (run / "checkpoint-5").mkdir(parents=True)
        (run / "checkpoint-5" / "whole").touch()
    with (
        pytest.raises(OutputError, match="bytes free on its disk") as raised,
        full_disk_named(run),
        small_files(),
    ):
        WRITERS[name](tmp_path / "file")
    assert raised.value.exit_code == 6
    assert ("--resume" in raised.value.remedy) == is_kept


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_what_a_library_raises_because_of_it_is_named_too(tmp_path, number):
    error = ValueError("could not save")
    error.__cause__ = OSError(number, os.strerror(number))
    with pytest.raises(OutputError), full_disk_named(tmp_path / "out.run"):
        raise error


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize(
    "said",
    [
        "I/O error: No space left on device (os error {})",
        'IoError(Os {{ code: {}, kind: StorageFull, message: "No space left on device" }})',
    ],
    ids=["safetensors 0.8", "safetensors 0.4"],
)
def test_what_any_safetensors_says_of_it_is_named(tmp_path, said, number):
    with pytest.raises(OutputError), full_disk_named(tmp_path / "out.run"):
        raise RuntimeError(f"Error while serializing: {said.format(number)}")


@pytest.mark.parametrize(
    "error", [RuntimeError("size mismatch"), FileNotFoundError(2, "x"), RecipeError("x")], ids=repr
)
def test_other_errors_stay_what_they_are(tmp_path, error):
    with pytest.raises(type(error)), full_disk_named(tmp_path / "out.run"):
        raise error
