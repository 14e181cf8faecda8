"""refresh(): delta against the weights as they are now."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import drift_merge
from drift_merge.errors import AlignmentError, OutputError, RecipeError
from drift_merge.training.deltas.refresh import _allocate
from tests import checkpoints as c
from tests.training.naive import biased
from tests.training.toys import fuse, holder, loss_of, make_toy, memory_tensors, selected


def run_python(code, *args):
    root = str(Path(__file__).parents[3])
    command = [sys.executable, "-c", code, *map(str, args)]
    environment = os.environ | {"PYTHONPATH": root}
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=root, env=environment
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def train(model, handle, steps=2):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for step in range(steps):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        handle.apply()
        optimizer.step()


def reasoner_minus(model, toy):
    reasoner = {
        n.split("language_model.")[-1]: t for n, t in memory_tensors(toy.pair.reasoner).items()
    }
    return {n: reasoner[n].double() - p.detach().double() for n, p in selected(model).items()}


@pytest.mark.parametrize("is_given", [True, False])
def test_delta_is_taken_from_the_current_weights(toy, is_given):
    model = toy.model()
    handle = drift_merge.attach(model, toy.prior, rule="gradnorm")
    train(model, handle)
    assert handle.report()["distance"] != 0.0
    handle.refresh(toy.pair.reasoner if is_given else None)
    assert handle.report()["distance"] == 0.0
    deltas = reasoner_minus(model, toy)
    model.zero_grad()
    loss_of(model, 9).backward()
    before = {n: p.grad.clone() for n, p in selected(model).items()}
    handle.apply()
    for name, parameter in selected(model).items():
        wanted = biased("gradnorm", before[name], deltas[name])
        assert torch.allclose(parameter.grad.double(), wanted, rtol=1e-5, atol=1e-6), name


def test_the_new_delta_leads_to_the_reasoner(toy):
    model = toy.model()
    handle = drift_merge.attach(model, toy.prior)
    train(model, handle)
    handle.refresh()
    deltas = reasoner_minus(model, toy)
    with torch.no_grad():
        for name, parameter in selected(model).items():
            parameter.add_(deltas[name].float())
    assert handle.report()["distance"] == pytest.approx(1.0, abs=1e-4)


def test_the_reasoner_may_have_a_vision_tower_of_its_own(toy, tmp_path):
    tensors = c.read_tensors(toy.pair.reasoner) | c.random_tensors(
        c.vision_shapes(), 7, dtype="F32"
    )
    seeing = c.write_checkpoint(tmp_path / "seeing", tensors, c.mllm_config())
    found = []
    for reasoner in (toy.pair.reasoner, seeing):
        model = toy.model()
        handle = drift_merge.attach(model, toy.prior, rule="absolute", alpha=1.0)
        train(model, handle)
        handle.refresh(reasoner)
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        handle.apply()
        found.append({name: p.grad for name, p in selected(model).items()})
    blind, both = found
    assert all(torch.equal(blind[name], both[name]) for name in blind)
    assert any(gradient.any() for gradient in both.values())


def test_fused_weights_and_embeddings_are_refreshed(tmp_path):
    toy = make_toy(tmp_path, modules="attn,mlp,embed")
    tensors = memory_tensors(toy.pair.mllm)
    model = holder(fuse(tensors))
    handle = drift_merge.attach(
        model, toy.prior, modules="attn,mlp,embed", rule="absolute", alpha=1.0
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.25)
    handle.refresh()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    handle.apply()
    reasoner = fuse(memory_tensors(toy.pair.reasoner))
    for name, parameter in model.named_parameters():
        if "norm" in name or "visual" in name or "lm_head" in name:
            assert not parameter.grad.any()
        else:
            wanted = parameter.detach() - reasoner[name]
            assert torch.allclose(parameter.grad, wanted, atol=1e-6), name


def test_nothing_is_left_on_the_disk(toy, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    model = toy.model()
    handle = drift_merge.attach(model, toy.prior)
    handle.refresh()
    assert list(tmp_path.iterdir()) == []
    loss_of(model).backward()
    handle.apply()


@pytest.mark.skipif(sys.platform != "linux", reason="limits the size of a file")
def test_a_disk_without_room_is_an_error_and_training_goes_on(toy, tmp_path):
    """Under a limit of 4 kB a file: as a full disk, without one. In a process of its own."""
    found = run_python(
        """
import resource, signal, sys, torch, drift_merge
from drift_merge.errors import OutputError
from drift_merge.priors.manifest import open_prior
from pathlib import Path
from tests.training.toys import Toy, loss_of
from tests import checkpoints as c
toy = Toy(c.Pair(Path(sys.argv[1]), Path(sys.argv[2])), open_prior(Path(sys.argv[3])))
model = toy.model()
handle = drift_merge.attach(model, toy.prior)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    handle.refresh(directory=sys.argv[4])
except OutputError as error:
    print(error)
loss_of(model).backward()
handle.apply()
print("steps", handle.steps)
""",
        toy.pair.reasoner,
        toy.pair.mllm,
        toy.prior.path,
        tmp_path,
    )
    assert f"for which {tmp_path} has no room" in found
    assert "handle.refresh(directory=...)" in found
    assert found.endswith("steps 1\n")
    assert list(tmp_path.iterdir()) == []


def test_the_place_of_the_new_delta_can_be_named(toy, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "nowhere"))
    handle = drift_merge.attach(toy.model(), toy.prior)
    with pytest.raises(OutputError, match="nowhere has no room"):
        handle.refresh()
    handle.refresh(directory=tmp_path)
    assert handle.report()["distance"] == 0.0


@pytest.mark.parametrize("number", [errno.EOPNOTSUPP, errno.EINVAL])
def test_where_nothing_can_be_reserved_bytes_are_written(tmp_path, monkeypatch, number):
    def refuse(*_):
        raise OSError(number, "not supported")

    monkeypatch.setattr("os.posix_fallocate", refuse)
    file = tmp_path / "file"
    with file.open("wb", buffering=0) as opened:
        _allocate(opened.fileno(), 3 * 2**20 + 5)
    assert file.stat().st_size == 3 * 2**20 + 5
    assert file.stat().st_blocks * 512 >= 3 * 2**20


def test_a_resumed_run_says_that_its_delta_was_refreshed(toy):
    model = toy.model()
    handle = drift_merge.attach(model, toy.prior)
    handle.refresh()
    with pytest.raises(RecipeError, match="refreshed its delta at step 0"):
        drift_merge.attach(model, toy.prior, state=handle.state_dict())


def test_several_priors_cannot_be_refreshed(toy, other_toy):
    handle = drift_merge.attach(toy.model(), [toy.prior, other_toy.prior])
    with pytest.raises(RecipeError, match="one prior"):
        handle.refresh()


def test_a_reasoner_without_the_tensors_is_refused(toy, tmp_path):
    small = make_toy(tmp_path, layers=1)
    handle = drift_merge.attach(toy.model(), toy.prior)
    with pytest.raises(AlignmentError, match=r"no partner for 10 of the 20"):
        handle.refresh(small.pair.reasoner)
