"""Where deltas wait: by what is free at the peak, with the memory of a made-up device."""

import pytest
import torch
from torch import nn

import drift_merge
from drift_merge.training import placing
from drift_merge.training.deltas import placement
from drift_merge.training.deltas.held import Resident
from drift_merge.training.deltas.packed import PackedFiles
from drift_merge.training.deltas.placement import Placement, place
from drift_merge.training.deltas.streamed import StreamedDeltas
from drift_merge.training.gradients.optimizer_state import pending_state_bytes
from drift_merge.training.units import Origin, Region, Unit
from tests.training.deltas.simulated import FakeMemory
from tests.training.toys import Toy, loss_of, make_toy, selected

CPU = torch.device("cpu")
META = torch.device("meta")
GB = 10**9


class Sized(Resident):
    """Packed deltas that have a size and no memory."""

    def __init__(self, size):
        self._size = size

    def packing(self, unit, region):
        from drift_merge.training.deltas.packed import Packing

        return Packing((), self._size)

    def pack(self, unit, region, out, readers=None):
        pass


def one_unit():
    return {Unit("u", "p", None, "mlp", 0, (4,), 0, Origin(0, 0, False)): Region(flat=(0, 4))}


def kind_of(monkeypatch, size, *, peak, state=0, wanted="auto"):
    """What is chosen for a prior of that size, without its memory."""
    monkeypatch.setattr(placement, "_placed", lambda kind, *_: kind)
    found = place(
        Sized(size),
        one_unit(),
        META,
        wanted=wanted,
        state_bytes=state,
        memory=FakeMemory(peak),
    )
    return found


# The review's cases: bytes of delta in bf16, of what a step needs, and of state to come.
@pytest.mark.parametrize(
    ("size", "peak", "state", "kind"),
    [
        (13.05 * GB, 20 * GB, 0.3 * GB, "resident"),  # 7B LoRA on an idle card
        (0.98 * GB, 20 * GB, 3.9 * GB, "resident"),  # 32B over 64 ranks
        (1.63 * GB, 40 * GB, 6.5 * GB, "resident"),  # 7B over 8 ranks
        (5.5 * GB, 75 * GB, 0, "streamed"),  # 3B, whose activations need the rest
        (13.05 * GB, 30 * GB, 52.2 * GB, "streamed"),  # 7B, all of it trained on one card
    ],
)
def test_delta_is_resident_where_it_fits_beside_the_peak(monkeypatch, size, peak, state, kind):
    assert kind_of(monkeypatch, int(size), peak=int(peak), state=int(state)) == kind


@pytest.mark.parametrize(("wanted", "kind"), [("cuda", "resident"), ("cpu", "streamed")])
def test_what_was_asked_for_is_done(monkeypatch, wanted, kind):
    for peak in (0, 80 * GB):
        assert kind_of(monkeypatch, GB, peak=peak, wanted=wanted) == kind


@pytest.mark.parametrize(("peak", "kind"), [(0, "resident"), (80 * GB, "streamed")])
def test_a_line_says_where_delta_waits_what_travels_and_why(toy, monkeypatch, caplog, peak, kind):
    fake = FakeMemory(peak)
    monkeypatch.setattr(placing, "place", lambda *a, **k: place(*a, memory=fake, **k))
    model = toy.model()
    handle = drift_merge.attach(model, toy.prior)
    assert handle.report()["placement"] is None
    loss_of(model).backward()
    with caplog.at_level("INFO", logger="drift_merge"):
        handle.apply()
    (record,) = caplog.records
    text = handle.report()["placement"]
    assert record.getMessage() == text
    assert record.levelname == {"resident": "INFO", "streamed": "WARNING"}[kind]
    assert f"delta is {kind}" in text
    assert "MB a step" in text or "0 bytes a step" in text
    assert "are free beside the peak of activations" in text
    handle.remove()


def test_on_a_cpu_the_line_says_what_is_read(toy):
    model = toy.model()
    handle = drift_merge.attach(model, toy.prior)
    loss_of(model).backward()
    handle.apply()
    assert handle.report()["placement"].startswith("delta is read from mapped files")


def two_layers():
    model = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2))
    return model, dict(model[0].named_parameters(prefix="0"))


def test_state_to_come_is_that_of_what_is_trained_here():
    model, biased = two_layers()
    optimizer = torch.optim.AdamW(model.parameters())
    assert pending_state_bytes([optimizer], biased, CPU) == 8 * (20 + 12)
    model[1].requires_grad_(False)
    assert pending_state_bytes([optimizer], biased, CPU) == 8 * 20
    assert pending_state_bytes([optimizer], biased, META) == 0
    assert pending_state_bytes([], biased, CPU) == 8 * 20
    assert pending_state_bytes([object()], biased, CPU) == 0  # DeepSpeed has made it already


def test_state_that_is_there_is_not_counted_again():
    model, biased = two_layers()
    optimizer = torch.optim.AdamW(model.parameters())
    model[0](torch.ones(1, 3)).sum().backward()
    optimizer.step()
    assert pending_state_bytes([optimizer], biased, CPU) == 8 * 12  # without a gradient so far


STORED = ("float32", "bfloat16", "float16", "int8", "float8_e4m3fn")


@pytest.fixture(scope="module")
def toys(tmp_path_factory) -> dict[str, Toy]:
    return {
        dtype: make_toy(tmp_path_factory.mktemp(dtype), dtype=dtype, layers=2) for dtype in STORED
    }


def biased(toy, monkeypatch, kind, **options):
    """Gradients after two steps, with delta where `kind` says."""

    def place(source, regions, device, **_):
        packs = PackedFiles(source)
        if kind == "streamed":
            return Placement(StreamedDeltas(packs, regions, device), kind, 0, kind)
        return Placement(Resident.copied(packs, regions, device), kind, 0, kind)

    if kind is not None:
        monkeypatch.setattr(placing, "place", place)
    model = toy.model()
    handle = drift_merge.attach(model, **{"prior": toy.prior} | options)
    for step in range(2):
        model.zero_grad()
        loss_of(model, step).backward()
        handle.apply()
    handle.remove()
    monkeypatch.undo()
    return torch.cat([p.grad.flatten() for p in selected(model).values()])


@pytest.mark.parametrize("kind", ["resident", "streamed"])
@pytest.mark.parametrize("dtype", STORED)
def test_gradients_are_the_same_bit_for_bit_wherever_delta_waits(toys, monkeypatch, dtype, kind):
    wanted = biased(toys[dtype], monkeypatch, None)
    assert torch.equal(biased(toys[dtype], monkeypatch, kind), wanted)


@pytest.mark.parametrize("kind", ["resident", "streamed"])
def test_several_priors_keep_their_own_bytes_on_the_way(toys, monkeypatch, kind):
    both = {"prior": [toys["int8"].prior, toys["bfloat16"].prior], "weights": [0.5, -0.25]}
    wanted = biased(toys["int8"], monkeypatch, None, **both)
    assert torch.equal(biased(toys["int8"], monkeypatch, kind, **both), wanted)


@pytest.mark.parametrize(("dtype", "size"), [("bfloat16", 2), ("int8", 1), ("float8_e4m3fn", 1)])
def test_what_travels_has_the_size_of_what_is_stored(toys, dtype, size):
    from drift_merge.training.deltas.files import FileDeltas
    from drift_merge.training.deltas.opened import open_for_training

    files = FileDeltas([open_for_training(toys[dtype].prior)], [1.0])
    shape = tuple(toys[dtype].prior.tensors["layers.0.mlp.up_proj.weight"]["shape"])
    unit = Unit("layers.0.mlp.up_proj.weight", "p", None, "mlp", 0, shape, 0, Origin(0, 0, False))
    packing = PackedFiles(files).packing(unit, Region(flat=(0, unit.numel)))
    elements = packing.parts[0].elements(torch.empty(packing.size_bytes, dtype=torch.uint8))
    assert elements.numel() * elements.element_size() == size * unit.numel
    assert packing.size_bytes <= size * unit.numel + 4 * shape[0] + 512


def test_rows_are_those_of_what_is_held():
    unit = Unit("0", "p", None, "mlp", 0, (12,), 0, Origin(0, 0, False))
    held = Resident.of_values({unit: torch.arange(12.0)})
    assert held.rows(unit, 3, 5).tolist() == [[3.0], [4.0]]


@pytest.mark.gpu
@pytest.mark.parametrize("device", ["auto", "cpu", "cuda"])
@pytest.mark.parametrize("rule", ["absolute", "adaptive_cosine"])
def test_a_gpu_gives_what_a_cpu_gives(toy, device, rule):
    found = []
    for where in ("cpu", "cuda"):
        model = toy.model().to(where)
        handle = drift_merge.attach(model, toy.prior, rule=rule, alpha=1.0, device=device)
        for name, parameter in selected(model).items():
            generator = torch.Generator().manual_seed(len(name))
            parameter.grad = torch.randn(parameter.shape, generator=generator).to(where)
        handle.apply()
        found.append(torch.cat([p.grad.flatten().cpu() for p in selected(model).values()]))
        assert handle.report()["cosine"] is not None
    assert torch.allclose(*found, rtol=1e-4, atol=1e-6)


@pytest.mark.gpu
def test_a_model_that_moves_to_the_gpu_after_attach_is_followed(toy):
    model = toy.model()
    handle = drift_merge.attach(model, toy.prior)
    model.to("cuda")
    for parameter in selected(model).values():
        parameter.grad = torch.ones_like(parameter)
    handle.apply()
    assert handle.metrics()["drift/bias_ratio"] > 0
