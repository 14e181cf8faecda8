"""Runs of the real command line in processes that may die, for the price of a fork.

Importing torch takes seconds, and hundreds of runs are killed here. So one server process
imports everything once and forks a child for each run; the child can be told to fail, to be
interrupted or to kill itself at its n-th call that changes the disk or sends to a server.

The server has one thread and has done no arithmetic, so that forking it is safe.
"""

import builtins
import ctypes
import errno
import gc
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[2]
PROGRAMS = ("drift-prior", "drift-merge")
WRITES = ("pwrite", "write")
SYNCS = ("fsync", "fdatasync")
RENAMES = ("rename",)
# Every call that changes the disk; `open` stands for builtins.open with a mode that writes.
CHANGES = (
    *WRITES,
    *SYNCS,
    *RENAMES,
    *("posix_fallocate", "ftruncate", "mkdir", "unlink", "rmdir", "open"),
)
SENDS = ("send",)  # of sockets: the head of a request, each piece of its body
TIMEOUT_SECONDS = 60
_PRELOADED = tuple(
    f"drift_merge.{name}"
    for name in (
        *("artifacts.checks", "cli.answers", "cli.merge", "cli.prior", "cli.commands.compute"),
        *("cli.commands.methods", "cli.commands.push", "cli.commands.verify", "engine.stream"),
        *("engine.strangers", "hub.pull", "hub.push", "maths.methods.elementwise"),
        *("maths.methods.trimming", "maths.methods.spectral.leading", "merges.make"),
        *("merges.verify", "priors.compress", "priors.compute", "priors.verify"),
    )
)
NO_MOUNT = 97  # exit code of a run that may not mount its small disk


class Run(NamedTuple):
    """How a run ended."""

    code: int  # exit code; minus the signal number when it was killed
    stdout: str
    stderr: str
    calls: list[str]  # calls that were counted, of a run that was not killed
    left: list[str]  # what the small disk of the run holds at its end


class Forks:
    """The client of one server process."""

    def __init__(self, environment: Mapping[str, str] | None = None) -> None:
        self._server = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.forks"],
            cwd=ROOT,
            env={**os.environ, **(environment or {})},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, *arguments: str, **request: Any) -> Run:
        """Run `drift-prior ...` or `drift-merge ...`.

        Args:
            arguments: the program and its arguments.
            request: `count`: names out of CHANGES and SENDS to be counted; `at`: the number of
                the call that fails, from 1; `do`: "kill", "interrupt", an errno, or "short" (all
                calls write one byte); `always`: every later counted call fails too; `extent_bytes`;
                `process_bytes`; `environment`: variables of the run; `cwd`; `no_root`: without the
                power to write where the mode forbids it; `disk` and `disk_bytes`: mount a file
                system of that size there, seen by this run alone; `blind`: neither statvfs nor
                posix_fallocate tell that it is small. Calls are counted in each process by itself.
        """
        return self.run_all([{"arguments": arguments, **request}])[0]

    def run_all(self, requests: Sequence[Mapping[str, Any]]) -> list[Run]:
        """Run several at the same time."""
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        with suppress(BrokenPipeError):
            self._server.stdin.write(json.dumps(list(requests), default=str) + "\n")
            self._server.stdin.flush()
        answer = self._server.stdout.readline()
        assert answer, "the server has ended; its traceback is on stderr"
        return [Run(**run) for run in json.loads(answer)]

    def strike(
        self, requests: Mapping[int, Mapping[str, Any]], do: object, **changes: Any
    ) -> list[Run]:
        """Run several at the same time, each struck at the call of its number, from 1."""
        changes = {"count": CHANGES, "do": do} | changes
        return self.run_all([{**request, "at": at, **changes} for at, request in requests.items()])

    def close(self) -> None:
        """End the server."""
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        with suppress(BrokenPipeError):
            self._server.stdin.close()
        self._server.wait(timeout=TIMEOUT_SECONDS)
        self._server.stdout.close()


def places(size: int) -> list[dict[str, str]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    every = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "test"}
    every |= {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
    return [{**every, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(size)]


def run_ranks(
    forks: Forks,
    size: int,
    arguments: Sequence[str],
    struck: Mapping[int, Mapping[str, Any]] | None = None,
) -> list[Run]:
    """One command on `size` ranks; `struck` says what befalls some of them."""
    requests = [
        {"arguments": arguments, "environment": place, "extent_bytes": 2000}
        | dict((struck or {}).get(rank, {}))
        for rank, place in enumerate(places(size))
    ]
    return forks.run_all(requests)


def _serve() -> None:
    import huggingface_hub.file_download  # what `--stream` needs
    import huggingface_hub.hf_api  # noqa: F401
    import torch
    import torch.distributed.rendezvous  # noqa: F401

    for name in (*_PRELOADED, *os.environ.get("FORKS_IMPORT", "").split()):
        importlib.import_module(name)
    gc.freeze()  # a collection in a child would touch, and so copy, every page
    assert threading.active_count() == 1
    for line in sys.stdin:
        with tempfile.TemporaryDirectory() as folder:
            requests = json.loads(line)
            children = [
                _fork(request, Path(folder, str(number))) for number, request in enumerate(requests)
            ]
            print(json.dumps([_wait(*child) for child in children]), flush=True)


def _fork(request: dict[str, Any], files: Path) -> tuple[int, Path]:
    files.mkdir()
    child = os.fork()
    if child == 0:
        try:
            _child(request, files)
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
        os._exit(99)
    return child, files


def _wait(child: int, files: Path) -> dict[str, Any]:
    deadline = time.monotonic() + float(os.environ.get("FORKS_SECONDS", TIMEOUT_SECONDS))
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGABRT)
        time.sleep(0.001)
    calls, left = files / "calls", files / "left"
    return {
        "code": os.waitstatus_to_exitcode(status),
        "stdout": (files / "stdout").read_text(),
        "stderr": (files / "stderr").read_text(),
        "calls": calls.read_text().split() if calls.exists() else [],
        "left": left.read_text().split() if left.exists() else [],
    }


def _child(request: dict[str, Any], files: Path) -> None:
    from drift_merge.cli import entry, merge, prior
    from drift_merge.engine import flushing, workers

    for number, name in ((1, "stdout"), (2, "stderr")):
        descriptor = os.open(files / name, os.O_WRONLY | os.O_CREAT)
        os.dup2(descriptor, number)
        os.close(descriptor)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(request.get("cwd", "/"))
    os.environ.update(request.get("environment", {}))
    if request.get("no_root"):
        _drop_capabilities()
    flushing.FLUSH_BYTES = request.get("extent_bytes", flushing.FLUSH_BYTES)
    workers.PROCESS_BYTES = request.get("process_bytes", workers.PROCESS_BYTES)
    if "disk" in request:
        _mount_small_disk(request["disk"], request["disk_bytes"])
    if request.get("blind"):
        _blind()
    calls = _install(request)
    program, *arguments = request["arguments"]
    sys.argv = [program, *arguments]
    group = {"drift-prior": prior.group, "drift-merge": merge.group}[program]
    try:
        entry.run(group, program)
    except SystemExit as error:
        sys.stdout.flush()
        sys.stderr.flush()
        Path(files, "calls").write_text(" ".join(list(calls)))
        if "disk" in request:
            Path(files, "left").write_text(" ".join(sorted(os.listdir(request["disk"]))))
        os._exit(error.code if isinstance(error.code, int) else 98)


def _install(request: dict[str, Any]) -> list[str]:
    """Count the calls asked for, and make the one asked for fail; the names called so far."""
    calls: list[str] = []
    lock = threading.Lock()
    thread = threading.main_thread().ident
    process = os.getpid()  # and not a child of it
    assert thread is not None

    def strike(name: str) -> bool:
        with lock:
            calls.append(name)
            number = len(calls)
        at = request.get("at", 0)
        if not at or number < at or (number > at and not request.get("always")):
            return False
        if request["do"] == "kill":
            os.kill(process, signal.SIGKILL)
        if request["do"] == "interrupt" and os.getpid() != process:
            os.kill(process, signal.SIGINT)
            return False
        if request["do"] == "interrupt":
            signal.pthread_kill(thread, signal.SIGINT)
            return False
        raise OSError(request["do"], os.strerror(request["do"]))

    def wrap(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **keywords: Any) -> Any:
            strike(name)
            if request.get("do") == "short" and name in WRITES:
                args = (args[0], memoryview(args[1])[:1], *args[2:])
            return real(*args, **keywords)

        return call

    def open_file(file: Any, mode: str = "r", *args: Any, **keywords: Any) -> Any:
        if set(mode) & set("wax+"):
            strike("open")
        return real_open(file, mode, *args, **keywords)

    real_open = builtins.open
    for name in request.get("count", ()):
        if name == "open":
            builtins.open = open_file  # type: ignore[assignment]
        elif name == "send":
            for method in ("send", "sendall"):
                setattr(socket.socket, method, wrap(name, getattr(socket.socket, method)))
        else:
            setattr(os, name, wrap(name, getattr(os, name)))
    return calls


def _blind() -> None:
    """A file system that cannot say how full it is, nor reserve space (as over a network)."""

    def no_reservation(*_: Any) -> None:
        raise OSError(errno.EOPNOTSUPP, "not supported")

    real = os.statvfs

    def endless(path: Any) -> os.statvfs_result:
        values = list(real(path))
        values[4] = 2**40
        return os.statvfs_result(values)

    os.posix_fallocate = no_reservation  # type: ignore[assignment]
    os.statvfs = endless


def _mount_small_disk(path: str, size: int) -> None:
    """Mount a tmpfs for this process alone; ends the process with NO_MOUNT if it may not."""
    libc = ctypes.CDLL(None, use_errno=True)
    new_namespace, new_user = 0x00020000, 0x10000000
    private, recursive = 1 << 18, 1 << 14
    if libc.unshare(new_namespace) != 0 and libc.unshare(new_namespace | new_user) != 0:
        os._exit(NO_MOUNT)
    libc.mount(None, b"/", None, private | recursive, None)
    if libc.mount(b"tmpfs", path.encode(), b"tmpfs", 0, f"size={size}".encode()) != 0:
        os._exit(NO_MOUNT)


def _drop_capabilities() -> None:
    """Root may write anywhere by CAP_DAC_OVERRIDE; without it, modes bind root as well."""
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # _LINUX_CAPABILITY_VERSION_3, this process
    if libc.capset(header, (ctypes.c_uint32 * 6)()) != 0:
        raise OSError(ctypes.get_errno(), "capset")


if __name__ == "__main__":
    _serve()
