"""`drift-prior train` over two processes: DDP and FSDP2 give what one process gives, and resume."""

import csv
import shutil
import socket
import sys

import pytest

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("PIL")

from safetensors.torch import load_file

from tests import checkpoints as c
from tests.real_trainers.train_command.commands import given, kill_at, run

pytestmark = [
    pytest.mark.engines,
    pytest.mark.filterwarnings("default"),
    pytest.mark.timeout(900),
]
# accelerate shards on accelerators alone: it is told to take these processes for such.
CPU_FSDP = """
from accelerate import state
from accelerate.utils import DistributedType

begin = state.AcceleratorState.__init__

def start(self, *given, **named):
    begin(self, *given, **named)
    plugin = named.get("fsdp_plugin")
    if plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, plugin
        state.PartialState._shared_state["distributed_type"] = DistributedType.FSDP

state.AcceleratorState.__init__ = start
import os
from drift_merge.cli.prior import main
from drift_merge.trainers.sft import run

if os.environ.get("KILLED_BEFORE_THE_OUTPUT"):
    run.write_output = lambda *_: os._exit(9)

main()
"""
KINDS = {"ddp": (), "fsdp": ("--fsdp",), "fsdp lora": ("--fsdp", "--lora", "4")}


def command(setup, out, *more, world):
    trained = ("--steps", "4", "--lr", "0.01", "--batch-size", "2", "--save-steps", "1", "-q")
    words = given(setup, out, *trained, *more)
    program = setup.mllm.parent / "cpu_fsdp.py"
    program.write_text(CPU_FSDP)
    if world == 1:
        return [sys.executable, str(program), *words, "--accumulation", "2"]
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(world)]
    rendezvous = ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    return [sys.executable, *launcher, *rendezvous, str(program), *words]


def by_accelerate(setup, out, *more, world):
    """The same, started by `accelerate launch`, which on a CPU needs Open MPI."""
    hosts = setup.mllm.parent / "hosts"
    hosts.write_text(f"localhost slots={world}\n")
    program, *words = command(setup, out, *more, world=1)[1:-2]  # without the accumulation
    launcher = ["-m", "accelerate.commands.accelerate_cli", "launch", "--cpu"]
    count = ["--num_machines", "1", "--num_processes", str(world)]
    count += ["--mpirun_hostfile", str(hosts)]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    return [sys.executable, *launcher, *count, "--main_process_port", port, program, *words]


def losses(out):
    return [float(row["loss"]) for row in csv.DictReader((out / "train.csv").open())]


def weights(out):
    (path,) = out.glob("*model.safetensors")
    return load_file(path)


@pytest.fixture(scope="module", params=KINDS)
def trained(request, setup, tmp_path_factory):
    """Two processes, undisturbed."""
    out = tmp_path_factory.mktemp("two") / "out"
    run(command(setup, out, *KINDS[request.param], world=2))
    return request.param, out


def test_two_processes_give_the_losses_and_weights_of_one(setup, trained, tmp_path):
    kind, two = trained
    one = tmp_path / "one"
    alone = tuple(word for word in KINDS[kind] if word != "--fsdp")
    run(command(setup, one, *alone, world=1))
    # Sums over ranks are in another order: some hundred float32 roundings of a loss of about 4.
    assert losses(two) == pytest.approx(losses(one), rel=1e-5)
    expected = weights(one)
    assert weights(two).keys() == expected.keys()
    for name, found in weights(two).items():
        # Adam's step is rate * m / sqrt(v): near 0 a rounding of g may turn a part of it.
        assert (found - expected[name]).abs().max() <= 0.02 * 4 * 0.01, name
        assert (found - expected[name]).abs().mean() <= 1e-5, name


@pytest.mark.skipif(shutil.which("mpirun") is None, reason="no Open MPI")
def test_accelerate_launch_gives_the_bytes_of_torchrun(setup, tmp_path):
    ours, theirs = tmp_path / "accelerate", tmp_path / "torchrun"
    root = dict.fromkeys(("OMPI_ALLOW_RUN_AS_ROOT", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM"), "1")
    run(by_accelerate(setup, ours, *KINDS["fsdp"], world=2), **root)
    run(command(setup, theirs, *KINDS["fsdp"], world=2))
    assert weights(ours).keys() == weights(theirs).keys()
    for name, found in weights(theirs).items():
        assert found.equal(weights(ours)[name]), name
    assert losses(ours) == losses(theirs)


def test_two_processes_killed_and_resumed_give_the_same_bytes(setup, trained, tmp_path):
    kind, whole = trained
    out = tmp_path / "out"
    words = command(setup, out, *KINDS[kind], world=2)
    kill_at(words, tmp_path / "out.run" / "checkpoint-2" / "whole", tmp_path / "log")
    assert not out.exists()
    run([*words, "--resume"], code=1, KILLED_BEFORE_THE_OUTPUT="1")  # torchrun's code
    assert (tmp_path / "out.run" / "checkpoint-4" / "whole").exists()
    assert not out.exists()
    run([*words, "--resume"])
    ours, theirs = c.read_files(out), c.read_files(whole)
    assert ours.keys() == theirs.keys()
    for name, data in theirs.items():
        assert ours[name] == data, name


def test_a_refusal_of_the_first_process_ends_all(setup, tmp_path):
    out = tmp_path / "out"
    (out / "x").mkdir(parents=True)
    failed = run(command(setup, out, world=2), code=1)  # torchrun's
    assert "exists already" in failed.stderr
    assert not (tmp_path / "out.run").exists()
