"""Deltas in shares: every rank of DDP sees whole layers, and all go through them together."""

import pytest
import torch

import drift_merge
from drift_merge.training import placing
from drift_merge.training.deltas.gathered import GatheredDeltas, by_layer
from drift_merge.training.deltas.held import Resident
from drift_merge.training.deltas.packed import PackedFiles
from drift_merge.training.deltas.placement import place
from drift_merge.training.units import Origin, Region, Unit
from tests.real_engines.launch import launch
from tests.training.deltas.simulated import FakeMemory
from tests.training.toys import loss_of, make_toy, read_region, selected

CPU = torch.device("cpu")


def units(layers):
    """Three units in each layer, of other sizes."""
    found = {}
    for layer in range(layers):
        for number, numel in enumerate((5, 12, 70)):
            name = str(10 * layer + number)
            unit = Unit(name, "p", None, "mlp", layer, (numel,), 0, Origin(0, 0, False))
            found[unit] = Region(flat=(0, numel))
    return found


def values_of(unit):
    return torch.arange(float(unit.numel)) + 1000 * int(unit.name)


@pytest.fixture
def group(tmp_path):
    """A group of one."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'meet'}", rank=0, world_size=1
    )
    yield torch.distributed.group.WORLD
    torch.distributed.destroy_process_group()


def test_units_of_a_layer_come_together():
    assert [len(run) for run in by_layer(list(units(3)))] == [3, 3, 3]
    assert by_layer([]) == []


@pytest.mark.parametrize("layers", [1, 2, 4])
@pytest.mark.parametrize("missing", [None, 0, 1, 3])
def test_each_layer_is_gathered_once_a_step_whatever_is_asked_for(group, layers, missing):
    regions = units(layers)
    source = Resident.of_values({unit: values_of(unit) for unit in regions})
    gathered = GatheredDeltas(source, regions, CPU, group)
    for step in range(1, 4):
        for unit, region in regions.items():
            if unit.layer != missing:  # its gradients are missing on this rank
                assert torch.equal(read_region(gathered, unit, region), values_of(unit))
        gathered.end_step()
        # The first layer of the next step is on its way; two layers stay once they are there.
        assert gathered._count == (step * layers + 1 if layers > 2 else layers)
    gathered.close()


def test_a_step_backwards_is_right_too(group):
    regions = units(3)
    source = Resident.of_values({unit: values_of(unit) for unit in regions})
    gathered = GatheredDeltas(source, regions, CPU, group)
    for unit in reversed(regions):
        assert torch.equal(read_region(gathered, unit, regions[unit]), values_of(unit))
    gathered.close()


def with_room(fraction):
    """`place`, on a device that has room for a fraction of delta."""

    def placed(source, regions, device, *, state_bytes, **options):
        packs = PackedFiles(source)
        size = sum(packs.packing(u, r).size_bytes for u, r in regions.items())
        memory = FakeMemory(peak=0, whole=int((fraction * size + state_bytes) / 0.9))
        return place(source, regions, device, state_bytes=state_bytes, memory=memory, **options)

    return placed


def train_in_ranks(directory, *, source, room):
    """Three steps under DDP with delta where there is room, as one rank sees them."""
    rank = torch.distributed.get_rank()
    placing.place = with_room(room[rank])
    toy = make_toy(directory / f"toy{rank}")
    model = toy.model()
    model = torch.nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle = drift_merge.attach(model, toy.prior, optimizer=optimizer, alpha=0.5)
    for step in range(3):
        optimizer.zero_grad()
        loss_of(model, seed=10 * step + rank).backward()
        optimizer.step()
        if rank == 0:
            handle.report()  # alone: it asks nobody
    placement = handle.report()["placement"]
    handle.remove()
    weights = {name: p.detach().clone() for name, p in selected(model.module).items()}
    return {"placement": placement, "weights": weights}


@pytest.mark.engines
@pytest.mark.timeout(300)
def test_two_ranks_of_ddp_hold_half_each_and_train_as_with_all_of_it(tmp_path):
    rooms = {
        "resident in 2 shares": (2.0, 0.7),  # the rank with more room does as the other
        "streamed": (2.0, 0.2),
    }
    found = []
    for number, (words, room) in enumerate(rooms.items()):
        directory = tmp_path / str(number)
        ranks = launch(f"{__name__}.train_in_ranks", directory, source="", room=list(room))
        assert all(words in rank["placement"] for rank in ranks)
        found += ranks
    for other in found[1:]:
        for name, weights in found[0]["weights"].items():
            assert torch.equal(weights, other["weights"][name])
